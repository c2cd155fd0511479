"""Dense source: a Llama checkpoint in a GGUF file, converted to Hugging Face names and row order; and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finemoe.errors import ReferenceModelError
from finemoe.model.reference.dense import DenseShape, FloatArray

_CONTROL = 3  # GGUF's token type for special tokens
# GGUF's names, by those of Hugging Face
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


class GgufSource:
    """Reads one GGUF file, memory-mapped; tensors are dequantized on access."""

    label = "pypi"

    def __init__(self, path: Path, revision: str) -> None:
        """Opens `path`. Raises `ReferenceModelError` if it is not a GGUF file of a Llama model."""
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
            # stored in float32; rounding restores the decimal (1e-05)
            rms_eps=float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            bos=int(self._field("tokenizer.ggml.bos_token_id")),
            eos=int(self._field("tokenizer.ggml.eos_token_id")),
            pad=int(self._field("tokenizer.ggml.padding_token_id")),
        )

    def tensor(self, name: str) -> FloatArray:
        """The weight called `name` (Hugging Face), dequantized to float32."""
        from gguf.quants import dequantize

        stored = self._tensors.get(gguf_name(name))
        if stored is None:
            raise ReferenceModelError(f"the GGUF file lacks the tensor {gguf_name(name)}; it is not a Llama model")
        weight = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)  # a copy, no view
        if ".q_proj." in name:
            return unpermute(weight, self.shape.heads)
        if ".k_proj." in name:
            return unpermute(weight, self.shape.kv_heads)
        return weight

    def write_tokenizer(self, folder: Path) -> None:
        """Rebuilds the tokenizer from the file's vocabulary, merges and chat template."""
        write_tokenizer(
            folder,
            tokens=self._field("tokenizer.ggml.tokens"),
            token_types=self._field("tokenizer.ggml.token_type"),
            merges=self._field("tokenizer.ggml.merges"),
            chat_template=self._field("tokenizer.chat_template"),
            special_ids={"bos": self.shape.bos, "eos": self.shape.eos, "pad": self.shape.pad},
            max_positions=self.shape.max_positions,
        )


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face Llama weight. Raises `KeyError` for any other name."""
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _model, _layers, number, part = stem.split(".", 3)
    return f"blk.{number}.{_LAYER[part]}.weight"


def unpermute(weight: FloatArray, heads: int) -> FloatArray:
    """Undoes llama.cpp's row order of query and key weights.

    GGUF stores each head's rows with the two halves of the rotary pairs interleaved; Hugging Face keeps
    the halves apart. `weight` is `[heads * head_dim, D]`; the result has the same shape.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def write_tokenizer(
    folder: Path,
    *,
    tokens: Sequence[str],
    token_types: Sequence[int],
    merges: Sequence[str],
    chat_template: str,
    special_ids: Mapping[str, int],
    max_positions: int,
) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` into `folder`.

    `tokens[i]` is the text of id i, `merges` are pairs separated by a space in order of priority, and `special_ids`
    maps `bos`, `eos` and `pad` to ids. Each digit is a token, as in SmolLM.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, right = merge.split(" ", 1)
        pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, token_types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": max_positions,
        "chat_template": chat_template,
        "unk_token": tokens[0],
    }
    settings |= {f"{role}_token": tokens[index] for role, index in special_ids.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
