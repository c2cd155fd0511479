"""Writes tiny random GGUF files of any MoE architecture, without a table of shapes.

`llama_model_init_from_user` takes only metadata and passes the name and shape of every required tensor to a callback.
These tensors are then written with random values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint32
from ctypes import c_void_p as pointer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from finemoe.gguf.binding import Library, Tensor, load_library

EXPERTS = re.compile(r"(gate_up|gate|up|down)_(ch)?exps\.weight$")
MLA = frozenset(
    ("bailingmoe3", "glm5-next", "dots3note", "deepseek2", "deepseek32", "glm-dsa", "kimi-linear", "mistral4")
)
RECURRENT = frozenset(("granitehybrid", "lfm2moe", "kimi-linear", "jamba", "nemotron_h_moe"))
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TypeOf = Callable[[str, int], Type]  # name and innermost dimension of an expert tensor -> stored type


def metadata(  # noqa: C901 - a table by architecture
    arch: str, experts: int = 8, active: int = 2
) -> dict[str, Any]:
    """Metadata of a small model: a few layers with 128 or 256 features."""
    mla = arch in MLA
    width, heads, hidden, layers = 256, 2, 384, 4
    if arch == "gemma4":
        width, heads, hidden, layers = 128, 2, 192, 5
    if mla:
        width, heads, hidden, layers = 128, 1, 192, 4
    if arch == "nemotron_h_moe":
        layers = 6
    head = width // heads
    values: dict[str, Any] = {
        "vocab_size": 300, "context_length": 512, "embedding_length": width, "features_length": width,
        "block_count": layers, "leading_dense_block_count": 1, "feed_forward_length": hidden,
        "use_parallel_residual": False, "logit_scale": 1.0, "full_attention_interval": 2,
        "attention.head_count": heads, "attention.head_count_kv": heads, "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0, "attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.q_lora_rank": 512, "attention.kv_lora_rank": 512, "attention.sliding_window": 16,
        "attention.sliding_window_pattern": 2, "attention.indexer.head_count": 1, "attention.indexer.key_length": 64,
        "attention.indexer.top_k": 8, "rope.dimension_sections": [head // 4] * 4,
        "expert_feed_forward_length": hidden, "interleave_moe_layer_step": 2, "expert_count": experts,
        "expert_used_count": active, "expert_shared_count": 1, "expert_gating_func": 2, "expert_group_scale": 1.0,
        "experts_per_group": 1, "ssm.inner_size": 256 if arch.startswith("qwen3") else 2 * width,
        "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.time_step_rank": heads, "ssm.group_count": 2,
        "kda.head_dim": 128, "shortconv.l_cache": 3, "expert_weights_scale": 1.0, "rope.freq_base": 10000.0,
        "rope.dimension_count": head, "expert_shared_feed_forward_length": hidden,
        "expert_chunk_feed_forward_length": hidden // 2,
    }  # fmt: skip
    if arch in {"granitemoe", "granitehybrid", "llama", "granite"}:
        values |= {"residual_scale": 1.0, "embedding_scale": 1.0, "attention.scale": 0.1}
    if arch in RECURRENT:
        counts = [0 if i % 2 else heads for i in range(layers)]
        if arch == "nemotron_h_moe":
            counts = [0, heads, 0, 0, heads, 0]
            values["feed_forward_length"] = [0, 0, hidden, 0, 0, hidden]
        values["attention.head_count"] = [heads] * layers if arch == "nemotron_h_moe" else counts
        values["attention.head_count_kv"] = counts
    if mla:
        values |= {
            "attention.key_length": 576, "attention.value_length": 512, "rope.dimension_count": 64,
            "attention.key_length_mla": 192, "attention.value_length_mla": 128,
            "attention.head_count_kv": values["attention.head_count_kv"] if arch == "kimi-linear" else 1,
        }  # fmt: skip
    if arch == "gemma4":
        values |= {
            "embedding_length_per_layer_input": width // 2, "attention.shared_kv_layers": 0,
            "attention.key_length_swa": head, "attention.value_length_swa": head, "attention.key_length": head,
            "attention.value_length": head, "rope.freq_base_swa": 10000.0, "rope.dimension_count_swa": head,
            "attention.sliding_window_pattern": [True, True, True, True, False],
        }  # fmt: skip
    if arch in {"cohere2moe", "mimo2", "step35"}:
        values["attention.sliding_window_pattern"] = [i % 2 for i in range(layers)]
    if arch == "bailingmoe3":
        values["kda.gate_lower_bound"] = -5.0
    if arch == "qwen4exp":
        values |= {"hyper_connection.count": 2, "hyper_connection.low_rank": 128}
    if arch == "ernie4_5-moe":
        values["interleave_moe_layer_step"] = 1
    own = {f"{arch}.{key}": value for key, value in values.items()}
    return {"general.name": f"random-{arch}", "tokenizer.ggml.model": "no_vocab"} | own


def shapes(arch: str, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Dimensions `ne` by name of every tensor that this metadata requires; `None` if the library rejects it."""
    library = load_library()
    api = library.api
    described = _describe(library, {"general.architecture": arch, **values})
    wanted: dict[str, tuple[int, ...]] = {}

    def take(tensor: Any, _: object) -> None:
        wanted[tensor[0].name.decode()] = tuple(tensor[0].ne)

    want = CFUNCTYPE(None, POINTER(Tensor), pointer)(take)
    params = api.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = 0, False
    init = api.llama_model_init_from_user
    init.restype, init.argtypes = pointer, [pointer, type(want), pointer, type(params)]
    model = init(described, want, None, params)
    library.last_error()
    if not model:
        return None
    api.llama_model_free(model)
    return wanted


def _describe(library: Library, values: Mapping[str, Any]) -> Any:
    api = library.api
    api.gguf_init_empty.restype = pointer
    setters: list[tuple[type, Any, Any]] = [
        (bool, api.gguf_set_val_bool, c_bool), (int, api.gguf_set_val_u32, c_uint32),
        (float, api.gguf_set_val_f32, c_float), (str, api.gguf_set_val_str, c_char_p),
    ]  # fmt: skip
    for _, function, kind in setters:
        function.restype, function.argtypes = None, [pointer, c_char_p, kind]
    api.gguf_set_arr_data.restype = None
    api.gguf_set_arr_data.argtypes = [pointer, c_char_p, c_int32, pointer, c_size_t]
    described = api.gguf_init_empty()
    for key, value in values.items():
        if isinstance(value, list):
            flags = isinstance(value[0], bool)
            array = np.array(value, np.int8 if flags else np.uint32)
            api.gguf_set_arr_data(described, key.encode(), 7 if flags else 4, array.ctypes.data, len(value))
            continue
        function = next(function for kind, function, _ in setters if type(value) is kind)
        function(described, key.encode(), value.encode() if isinstance(value, str) else value)
    return described


def quantise(values: npt.NDArray[np.float32], kind: Type) -> npt.NDArray[Any]:
    """Quantise floats `[.., n]` to this type with the library."""
    if kind == Type.F32:
        return values
    if kind == Type.F16:
        return values.astype(np.float16)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]))
    stored = np.empty((len(rows), rows.shape[1] // block * size), np.uint8)
    load_library().api.ggml_quantize_chunk(
        int(kind), rows.ctypes.data, stored.ctypes.data, 0, len(rows), rows.shape[1], None
    )
    return stored.reshape(*values.shape[:-1], -1)


def write(  # noqa: C901 - a script
    path: Path,
    arch: str,
    *,
    stored_as: TypeOf = lambda _name, _width: Type.Q8_0,
    fused: bool = True,
    overrides: Mapping[str, Any] | None = None,
    split_bytes: int = 0,
    tokenizer: bool = False,
) -> bool:
    """Write a model with random weights. Returns whether the library accepts its metadata.

    Args:
        path: the file; parts of a split set are written to the same folder with their own names.
        arch: architecture name in the library.
        stored_as: type of each expert tensor.
        fused: keep gate and up projections in one tensor if the library fuses them; otherwise write two.
        overrides: metadata to change; keys without the architecture prefix.
        split_bytes: start a new file after this many bytes; 0: one file.
        tokenizer: add a tokenizer with one token per byte, and a chat template.
    """
    values = metadata(arch) | {f"{arch}.{key}": value for key, value in (overrides or {}).items()}
    wanted = shapes(arch, values)
    if wanted is None:
        return False
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, arch, split_max_size=split_bytes)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if tokenizer:
        del values["tokenizer.ggml.model"]
        _add_tokenizer(writer, values[f"{arch}.vocab_size"])
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds[type(value)](key, value)  # type: ignore[operator]

    def put(name: str, shape: tuple[int, ...]) -> None:
        array = _random(rng, name, shape)
        if EXPERTS.search(name):
            kind = stored_as(name, shape[-1])
            writer.add_tensor(name, quantise(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)

    for name, ne in wanted.items():
        scales = name.endswith((".input_scale", ".scale"))  # only in NVFP4 files
        if scales and not (arch == "gemma4" and name.endswith(("down_exps.scale", "gate_inp.scale"))):
            continue
        dimensions = 3 if EXPERTS.search(name) else max(i for i in range(4) if ne[i] > 1 or i == 0) + 1
        shape = tuple(int(size) for size in reversed(ne[:dimensions]))
        if not fused and "gate_up_exps" in name:
            if name.endswith("weight"):
                for part in ("gate", "up"):
                    put(name.replace("gate_up", part), (shape[0], shape[1] // 2, shape[2]))
            continue
        put(name, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return True


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 maps other bytes to characters from 256 up
    others = [byte for byte in range(256) if byte not in shown]
    names = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    spare = [f"<|{number}|>" for number in range(size - 256 - len(special))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(names[byte] for byte in range(256)), *special, *spare])
    writer.add_token_types([1] * 256 + [3] * len(special) + [1] * len(spare))
    writer.add_token_merges([f"{names[32]} {names[116]}"])
    writer.add_eos_token_id(256)
    writer.add_add_bos_token(value=False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if name.endswith("ssm_a") or ".ssm_a." in name:
        values = -rng.uniform(0.1, 1, shape)
    elif "rope_freqs" in name:
        values = np.ones(shape)
    elif ("norm" in name and name.endswith("weight")) or name.endswith(("scale", "scale.weight")):
        values = 1 + rng.standard_normal(shape) * 0.05
    else:
        values = rng.standard_normal(shape) * (0.05 if "embd" not in name else 0.5)
    return values.astype(np.float32)
