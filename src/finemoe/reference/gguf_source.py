"""A dense Llama checkpoint in a GGUF file, under Hugging Face names and in Hugging Face row order."""

from pathlib import Path
from typing import Any

import numpy as np

from finemoe.reference.dense import DenseShape, FloatArray
from finemoe.reference.errors import ReferenceModelError
from finemoe.reference.tokenizer import write_tokenizer

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face Llama weight. Raises `KeyError` for a name that Llama has not."""
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _model, _layers, number, part = stem.split(".", 3)
    return f"blk.{number}.{_LAYER[part]}.weight"


def unpermute(weight: FloatArray, heads: int) -> FloatArray:
    """Undo llama.cpp's row order of query and key weights.

    GGUF stores each head's rows with the two halves of the rotary pairs interleaved; Hugging Face keeps
    the halves apart. `weight` is `[heads * head_dim, D]`; the result has the same shape.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


class GgufSource:
    """Reads one GGUF file, memory-mapped; a tensor is dequantised when it is asked for."""

    label = "pypi"

    def __init__(self, path: Path, revision: str) -> None:
        """Open `path`. Raises `ReferenceModelError` when it is not a GGUF file of a Llama model."""
        from gguf import GGUFReader

        self.revision = revision
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise ReferenceModelError(
                f"{path} is not a readable GGUF file ({error}); delete it and try again"
            ) from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shape = self._read_shape()

    def _field(self, key: str) -> Any:
        try:
            return self._fields[key].contents()
        except KeyError:
            raise ReferenceModelError(f"the GGUF file lacks the field {key}; it is not a Llama model") from None

    def _read_shape(self) -> DenseShape:
        hidden, heads = int(self._field("llama.embedding_length")), int(self._field("llama.attention.head_count"))
        return DenseShape(
            layers=int(self._field("llama.block_count")),
            hidden=hidden,
            neurons=int(self._field("llama.feed_forward_length")),
            heads=heads,
            kv_heads=int(self._field("llama.attention.head_count_kv")),
            head_dim=hidden // heads,
            vocab=len(self._field("tokenizer.ggml.tokens")),
            max_positions=int(self._field("llama.context_length")),
            rope_theta=float(self._field("llama.rope.freq_base")),
            # Stored in float32; the rounding brings back the decimal that was meant (1e-05).
            rms_eps=float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            bos=int(self._field("tokenizer.ggml.bos_token_id")),
            eos=int(self._field("tokenizer.ggml.eos_token_id")),
            pad=int(self._field("tokenizer.ggml.padding_token_id")),
        )

    def tensor(self, name: str) -> FloatArray:
        """The weight called `name` (Hugging Face), dequantised to float32."""
        from gguf.quants import dequantize

        stored = self._tensors.get(gguf_name(name))
        if stored is None:
            raise ReferenceModelError(f"the GGUF file lacks the tensor {gguf_name(name)}; it is not a Llama model")
        weight = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)  # out of the mapped file
        if ".q_proj." in name:
            return unpermute(weight, self.shape.heads)
        if ".k_proj." in name:
            return unpermute(weight, self.shape.kv_heads)
        return weight

    def write_tokenizer(self, folder: Path) -> None:
        """Rebuild the tokenizer from the file's vocabulary, merges and chat template."""
        write_tokenizer(
            folder,
            tokens=self._field("tokenizer.ggml.tokens"),
            token_types=self._field("tokenizer.ggml.token_type"),
            merges=self._field("tokenizer.ggml.merges"),
            chat_template=self._field("tokenizer.chat_template"),
            special_ids={"bos": self.shape.bos, "eos": self.shape.eos, "pad": self.shape.pad},
            max_positions=self.shape.max_positions,
        )
