"""ctypes binding to llama.cpp's C API, from one pinned wheel. Needs no compiler.

Functions of the C API are stable, struct layouts are not. Therefore exactly one version is accepted, and the layouts
declared here are compared at load with the defaults that the library fills in. The parameter structs are padded at the
end, so that a larger struct in the library can't write past them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from ctypes import CFUNCTYPE, POINTER, Structure, c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32
from ctypes import c_void_p as pointer
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finemoe.errors import ConfigError

PACKAGE, VERSION = "xllamacpp", "2026.10.11549"
_INSTALL = 'pip install "finemoe[gguf]"'
_CPU_FLAGS = ("avx2", "fma", "f16c")  # required by the x86 wheel, which has no fallback
_SPARE_BYTES = 256
_ERROR, _CONTINUED = 4, 5  # log levels
LOAD_MMAP = 1


class ModelParams(Structure):
    """`llama_model_params`."""

    _fields_ = (
        ("devices", pointer), ("tensor_buft_overrides", pointer), ("n_gpu_layers", c_int32), ("split_mode", c_int32),
        ("load_mode", c_int32), ("lazy_mode", c_int32), ("main_gpu", c_int32), ("tensor_split", pointer),
        ("progress_callback", pointer), ("progress_callback_user_data", pointer), ("kv_overrides", pointer),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool),
        ("no_alloc", c_bool), ("load_mtp", c_bool), ("spare", ctypes.c_ubyte * _SPARE_BYTES),
    )  # fmt: skip


class ContextParams(Structure):
    """`llama_context_params`."""

    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int32), ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32), ("attention_type", c_int32), ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float), ("rope_freq_scale", c_float), ("yarn", c_float * 4), ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float), ("cb_eval", pointer), ("cb_eval_user_data", pointer), ("type_k", c_int32),
        ("type_v", c_int32), ("moe_cache_size", c_size_t), ("abort_callback", pointer),
        ("abort_callback_data", pointer), ("embeddings", c_bool), ("offload_kqv", c_bool), ("no_perf", c_bool),
        ("op_offload", c_bool), ("swa_full", c_bool), ("kv_unified", c_bool), ("samplers", pointer),
        ("n_samplers", c_size_t), ("ctx_other", pointer), ("spare", ctypes.c_ubyte * _SPARE_BYTES),
    )  # fmt: skip


class Batch(Structure):
    """`llama_batch`: tokens `[n_tokens]`, their positions and sequences, and a flag for each that needs logits."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", pointer), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(ctypes.c_int8)),
    )  # fmt: skip


class Tensor(Structure):
    """`ggml_tensor`, a node of the compute graph. `ne`: dimensions, innermost first; `nb`: strides in bytes."""

    _fields_ = (
        ("type", c_int32), ("buffer", pointer), ("ne", c_int64 * 4), ("nb", c_size_t * 4), ("op", c_int32),
        ("op_params", c_int32 * 16), ("flags", c_int32), ("src", pointer * 10), ("view_src", pointer),
        ("view_offs", c_size_t), ("data", pointer), ("name", ctypes.c_char * 64), ("extra", pointer),
        ("padding", ctypes.c_char * 8),
    )  # fmt: skip


class SamplerChainParams(Structure):
    """`llama_sampler_chain_params`."""

    _fields_ = (("no_perf", c_bool),)


EvalCallback = CFUNCTYPE(c_bool, pointer, c_bool, pointer)  # node, ask, user data
LogCallback = CFUNCTYPE(None, c_int32, c_char_p, pointer)

_Tokens, _Logits = POINTER(c_int32), POINTER(c_float)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # result, arguments
    "ggml_op_name": (c_char_p, c_int32),
    "ggml_quantize_chunk": (c_size_t, c_int32, pointer, pointer, c_int64, c_int64, c_int64, pointer),
    "ggml_tensor_overhead": (c_size_t,),
    "llama_backend_init": (None,),
    "llama_batch_free": (None, Batch),
    "llama_batch_init": (Batch, c_int32, c_int32, c_int32),
    "llama_context_default_params": (ContextParams,),
    "llama_decode": (c_int32, pointer, Batch),
    "llama_free": (None, pointer),
    "llama_get_logits_ith": (_Logits, pointer, c_int32),
    "llama_get_memory": (pointer, pointer),
    "llama_init_from_model": (pointer, pointer, ContextParams),
    "llama_log_set": (None, LogCallback, pointer),
    "llama_memory_clear": (None, pointer, c_bool),
    "llama_memory_seq_rm": (c_bool, pointer, c_int32, c_int32, c_int32),
    "llama_model_chat_template": (c_char_p, pointer, c_char_p),
    "llama_model_default_params": (ModelParams,),
    "llama_model_free": (None, pointer),
    "llama_model_get_vocab": (pointer, pointer),
    "llama_model_has_encoder": (c_bool, pointer),
    "llama_model_is_diffusion": (c_bool, pointer),
    "llama_model_is_hybrid": (c_bool, pointer),
    "llama_model_is_recurrent": (c_bool, pointer),
    "llama_model_load_from_file": (pointer, c_char_p, ModelParams),
    "llama_model_n_ctx_train": (c_int32, pointer),
    "llama_n_ctx": (c_uint32, pointer),
    "llama_sampler_accept": (None, pointer, c_int32),
    "llama_sampler_chain_add": (None, pointer, pointer),
    "llama_sampler_chain_default_params": (SamplerChainParams,),
    "llama_sampler_chain_init": (pointer, SamplerChainParams),
    "llama_sampler_free": (None, pointer),
    "llama_sampler_init_dist": (pointer, c_uint32),
    "llama_sampler_init_greedy": (pointer,),
    "llama_sampler_init_min_p": (pointer, c_float, c_size_t),
    "llama_sampler_init_penalties": (pointer, c_int32, c_int32, c_float, c_float, c_float),  # size, window
    "llama_sampler_init_temp": (pointer, c_float),
    "llama_sampler_init_top_k": (pointer, c_int32),
    "llama_sampler_init_top_p": (pointer, c_float, c_size_t),
    "llama_sampler_sample": (c_int32, pointer, pointer, c_int32),
    "llama_state_seq_get_data": (c_size_t, pointer, pointer, c_size_t, c_int32),
    "llama_state_seq_get_size": (c_size_t, pointer, c_int32),
    "llama_state_seq_set_data": (c_size_t, pointer, pointer, c_size_t, c_int32),
    "llama_token_to_piece": (c_int32, pointer, c_int32, c_char_p, c_int32, c_int32, c_bool),
    "llama_tokenize": (c_int32, pointer, c_char_p, c_int32, _Tokens, c_int32, c_bool, c_bool),
    "llama_vocab_bos": (c_int32, pointer),
    "llama_vocab_eos": (c_int32, pointer),
    "llama_vocab_get_add_bos": (c_bool, pointer),
    "llama_vocab_is_eog": (c_bool, pointer, c_int32),
    "llama_vocab_n_tokens": (c_int32, pointer),
    "llama_vocab_type": (c_int32, pointer),
}


class Library:
    """The loaded library. `api` holds its functions with declared signatures.

    Args:
        path: the shared object.

    Raises:
        ConfigError: a function is missing, or a struct layout differs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # otherwise a failed assertion attaches a debugger
        self.api: Any = ctypes.CDLL(str(path))
        self._errors: deque[str] = deque(maxlen=8)
        self._log = LogCallback(self._on_log)  # keep a reference: the library calls it
        try:
            for name, (result, *arguments) in _FUNCTIONS.items():
                function = getattr(self.api, name)
                function.restype, function.argtypes = result, arguments
        except AttributeError as error:
            raise _other(f"it lacks a function ({error})") from error
        self._check_layout()
        self.api.llama_log_set(self._log, None)
        self.api.llama_backend_init()

    def last_error(self) -> str:
        """The library's error messages since the last call, in one line; empty if there are none. Clears them."""
        message = "; ".join(dict.fromkeys(line.strip() for line in self._errors if line.strip()))
        self._errors.clear()
        return message

    def op(self, name: bytes) -> int:
        """The number of a graph operation with this name."""
        for number in range(512):
            if self.api.ggml_op_name(number) == name:
                return number
        raise _other(f"it has no operation {name.decode()}")

    def _on_log(self, level: int, text: bytes | None, _: object) -> None:
        if level == _ERROR or (level == _CONTINUED and self._errors):
            self._errors.append((text or b"").decode(errors="replace"))

    def _check_layout(self) -> None:
        model, context = self.api.llama_model_default_params(), self.api.llama_context_default_params()
        known = (
            (model.n_gpu_layers, model.load_mode, model.use_extra_bufts) == (-1, -1, True)
            and (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max) == (512, 2048, 512, 1)
            and (context.type_k, context.type_v, context.flash_attn_type) == (1, 1, -1)
            and list(context.yarn) == [-1.0] * 4 and context.defrag_thold == -1.0
            and context.cb_eval is None and context.offload_kqv and context.op_offload and context.swa_full
            and self.api.ggml_tensor_overhead() == ctypes.sizeof(Tensor) + 32
        )  # fmt: skip
        if not known:
            raise _other("its struct layouts differ")


def _other(reason: str) -> ConfigError:
    return ConfigError(
        f"GGUF models: {PACKAGE} {VERSION} is not the build that finemoe expects: {reason}; reinstall: {_INSTALL}"
    )


def cpu_lacks(flags: str) -> list[str]:
    """The instruction sets that the library requires and that are not in these CPU flags."""
    return [flag.upper() for flag in _CPU_FLAGS if flag not in flags.split()]


def find_library() -> Path:
    """Find the pinned wheel's shared object and check that this machine can run it; does not load it.

    Raises:
        ConfigError: the wheel is missing, has another version, or does not support this machine.
    """
    if sys.platform != "linux":
        raise ConfigError(f"GGUF models: run on Linux only, not on {sys.platform}; use a safetensors checkpoint")
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        raise ConfigError(f"GGUF models: need {PACKAGE} {VERSION}; {_INSTALL}") from None
    if installed != VERSION:
        raise ConfigError(f"GGUF models: {PACKAGE} {installed} is installed, {VERSION} is needed; {_INSTALL}")
    machine = os.uname().machine
    if machine == "x86_64":
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        flags = next((line for line in cpu.splitlines() if line.startswith("flags")), "")
        if lacking := cpu_lacks(flags):
            raise ConfigError(
                f"GGUF models: this CPU has no {', '.join(lacking)}, which {PACKAGE} is compiled for; "
                "use a safetensors checkpoint"
            )
    spec = find_spec(PACKAGE)  # does not import it
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [path for folder in folders for path in sorted(Path(folder).glob(f"{PACKAGE}*.so"))]
    if not found:
        raise ConfigError(f"GGUF models: {PACKAGE} {VERSION} has no shared object for {machine}; {_INSTALL}")
    return found[0]


@cache
def load_library() -> Library:
    """Load the library, once per process.

    Raises:
        ConfigError: the wheel is missing, has another version, or does not support this machine.
    """
    path = find_library()
    try:
        return Library(path)
    except OSError:
        import torch  # noqa: F401 - loads its OpenMP runtime, in case the system has none

    try:
        return Library(path)
    except OSError as error:
        raise ConfigError(f"GGUF models: {path}: can't be loaded ({error}); {_INSTALL}") from error
