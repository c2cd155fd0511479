"""Settings as frozen dataclasses: each name, default and help text stands here once.

The command line's flags and the arguments of `finemoe.load` are generated from these fields: `expert_memory` is
`--expert-memory`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from finemoe.budget import parse_bandwidth, parse_budget
from finemoe.errors import ConfigError

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|cuda:\d+(,cuda:\d+)+")

REPLAY_HELP = (
    "for benchmarks: force the routing recorded in this trace onto the model, so that random weights have real "
    "locality; the text is meaningless, and all output says so"
)


def refuse_undecodable(text: str, name: str) -> None:
    """Raises `ConfigError` for text that was not valid UTF-8 (Python decodes such bytes to lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: is not valid UTF-8") from error


STORED = "stored"  # the checkpoint's own dtype
EXPERT_DTYPES = (STORED, "int8", "int4")


def setting(default: Any, text: str, *, advanced: bool = False) -> Any:
    """A dataclass field with its help text; `--help` leaves advanced ones to `--help-all`."""
    return field(default=default, metadata={"help": text, "advanced": advanced})


@dataclass(frozen=True)
class LoadConfig:
    """Which model to load, and how its experts are held in memory."""

    model: str | None = setting(
        None,
        "folder, .gguf file or Hugging Face hub id (of GGUF models with a quantisation: org/name:Q4_K_M); by default "
        "the built-in reference model",
    )
    expert_memory: str = setting("25%", "hard limit for resident experts: bytes (2GiB), a share (25%) or all")
    device: str = setting(
        "auto",
        "where the model runs and the expert pool is: cpu, cuda, one or several devices (cuda:0,cuda:1), or auto: cuda "
        "if there is one",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "compute in this dtype; auto takes the checkpoint's"
    )
    expert_dtype: str = setting(
        STORED,
        f"one of {', '.join(EXPERT_DTYPES)}: int8 and int4 keep and move the experts of an unquantized checkpoint in "
        "fewer bits, which is lossy; a copy is made once, in the cache folder; all output says so",
    )
    policy: str = setting(
        "finemoe",
        "eviction and prefetching: finemoe, lru, lfu, lfru, or a published system's policy (docs/simulator.md)",
    )
    explain: bool = setting(
        default=False, text="report predictions, hits, late hits, misses and wasted prefetches by layer and source"
    )
    threads: int = setting(
        0, "threads that compute; 0: torch's own choice, and for a GGUF model as many as cores are idle", advanced=True
    )
    kv_cache_dtype: Literal["auto", "q8_0"] = setting(
        "auto", "of a GGUF model: q8_0 keeps keys and values in 8 bits, auto in 16", advanced=True
    )
    revision: str | None = setting(None, "hub revision (branch, tag or commit)", advanced=True)
    trust_remote_code: bool = setting(
        default=False, text="run modelling code that the model's repository ships", advanced=True
    )
    predictors: str | None = setting(None, "file written by finemoe trace train, for --policy promoe", advanced=True)
    map_store: str | None = setting(
        None,
        "file that a learning policy starts from and saves to; none to keep nothing (default: one per model and policy "
        "in the cache folder)",
        advanced=True,
    )
    io: Literal["auto", "direct", "buffered"] = setting(
        "auto", "how experts are read: direct bypasses the page cache; auto does so where possible", advanced=True
    )
    reader_threads: int = setting(4, "threads that read experts", advanced=True)
    link_bandwidth: str | None = setting(
        None,
        "for experiments: read experts no faster than this many bytes per second (500MiB), as over a slower link; all "
        "output says so",
        advanced=True,
    )
    verify: bool = setting(
        default=False, text="debug: read every expert a second time by another path and compare", advanced=True
    )
    host_memory: str | None = setting(
        None,
        "on a GPU: pinned host memory that caches experts between disk and GPU: bytes, a share or all (default: as "
        "many as fit)",
        advanced=True,
    )
    expert_kernel: Literal["auto", "eager", "grouped_mm"] = setting(
        "auto",
        "on a GPU: which of transformers' experts implementations to match; auto is grouped_mm where its results do "
        "not depend on residency, else eager",
        advanced=True,
    )
    host_compute: Literal["off", "auto"] = setting(
        "off",
        "experimental, on a GPU: auto computes missing experts of few tokens on the CPU where that is faster than "
        "copying them; answers then differ in rounding, depending on residency",
        advanced=True,
    )

    @property
    def link_bandwidth_bytes_s(self) -> float | None:
        """The throttled link's bandwidth, bytes/s; `None` if it is not throttled."""
        return None if self.link_bandwidth is None else parse_bandwidth(self.link_bandwidth)

    @property
    def lossy(self) -> bool:
        """Whether experts are quantized to fewer bits than the checkpoint's, which changes answers."""
        return self.expert_dtype != STORED

    def __post_init__(self) -> None:
        parse_budget(self.expert_memory)
        if self.host_memory is not None:
            parse_budget(self.host_memory, "--host-memory")
        self._check_device()
        if self.link_bandwidth is not None:
            parse_bandwidth(self.link_bandwidth)
        if not 1 <= self.reader_threads <= 64:
            raise ConfigError(f"--reader-threads: {self.reader_threads} is not between 1 and 64")
        if not 0 <= self.threads <= 1024:
            raise ConfigError(f"--threads: {self.threads} is not between 0 and 1024")
        for name, allowed in (
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("io", ("auto", "direct", "buffered")),
            ("expert_kernel", ("auto", "eager", "grouped_mm")),
            ("host_compute", ("off", "auto")),
            ("expert_dtype", EXPERT_DTYPES),
            ("kv_cache_dtype", ("auto", "q8_0")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"--{name.replace('_', '-')}: {value!r} is not one of {', '.join(allowed)}")

    def _check_device(self) -> None:
        named = self.device.split(",")
        if not _DEVICE.fullmatch(self.device) or len(set(named)) < len(named):
            raise ConfigError(
                f"--device: can't read {self.device!r}; give cpu, cuda, different devices (cuda:0,cuda:1) or auto"
            )
        if self.device == "cpu":
            self.refuse_gpu_settings()
        elif self.device != "auto" and self.link_bandwidth is not None:
            self.refuse_cpu_settings()

    def refuse_gpu_settings(self) -> None:
        """Raises `ConfigError` for a setting that has no effect on the CPU."""
        defaults = {each.name: each.default for each in fields(self)}
        for name in ("host_memory", "expert_kernel", "host_compute"):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"--{name.replace('_', '-')}: has no effect on the CPU; give --device cuda too")

    def refuse_gguf_settings(self) -> None:
        """Raises `ConfigError` for a setting that has an effect on GGUF models only."""
        if self.kv_cache_dtype != "auto":
            raise ConfigError("--kv-cache-dtype: is for GGUF models; leave it out")

    def refuse_cpu_settings(self) -> None:
        """Raises `ConfigError` for a setting that is for the CPU only."""
        if self.link_bandwidth is not None:
            raise ConfigError("--link-bandwidth: is for experiments on the CPU; give --device cpu too")


_MOST_SEED = 2**63 - 1  # the largest that torch accepts everywhere


@dataclass(frozen=True)
class GenerateConfig:
    """Length and sampling of an answer; greedy unless a temperature is given."""

    max_new_tokens: int = setting(128, "stop after this many tokens")
    temperature: float = setting(0.0, "0 is greedy; above, sample at this temperature")
    top_p: float = setting(1.0, "sample from the smallest set of tokens with this probability")
    top_k: int = setting(0, "sample from this many of the likeliest tokens; 0: from all", advanced=True)
    min_p: float = setting(
        0.0, "sample from tokens at least this likely, as a share of the likeliest one's probability", advanced=True
    )
    repetition_penalty: float | None = setting(
        None,
        "divides the scores of tokens that came before; 1: none (default: the model's own, for a GGUF model none)",
        advanced=True,
    )
    frequency_penalty: float = setting(
        0.0, "of a GGUF model: subtracted from a token's score for each time it came before", advanced=True
    )
    presence_penalty: float = setting(
        0.0, "of a GGUF model: subtracted from the scores of tokens that came before", advanced=True
    )
    seed: int = setting(0, "seed of the sampling")
    raw: bool = setting(default=False, text="pass the prompt as it is, without the chat template", advanced=True)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens: {self.max_new_tokens} is not at least 1")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"--temperature: {self.temperature} is not between 0 and 100")
        if not 0 <= self.seed <= _MOST_SEED:
            raise ConfigError(f"--seed: {self.seed} is not between 0 and {_MOST_SEED}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p: {self.top_p} is not above 0 and at most 1")
        for name, fits, wanted in (
            ("top_k", self.top_k >= 0, "at least 0"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty is None or 0 < self.repetition_penalty <= 10, "in (0, 10]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
        ):
            if not fits:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not {wanted}")
        for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
            if getattr(self, name) != off and self.temperature == 0:
                raise ConfigError(f"--{name.replace('_', '-')}: has no effect without sampling; give --temperature too")


@dataclass(frozen=True)
class PrefillConfig:
    """How a prompt is processed."""

    prefill_chunk: int | None = setting(
        None,
        "process a prompt this many tokens at a time: less memory, but each chunk needs its experts again, and in "
        "bfloat16 rounding may change tokens, as with transformers' own chunked prefill (default: whole)",
        advanced=True,
    )

    def __post_init__(self) -> None:
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"--prefill-chunk: {self.prefill_chunk} is not at least 1")


@dataclass(frozen=True)
class ReplayConfig:
    """Forced routing from a trace instead of the model's own."""

    replay_routing: str | None = setting(None, REPLAY_HELP, advanced=True)


@dataclass(frozen=True)
class RecordConfig:
    """Which prompts to record, the batch size, and for how many layers ahead gates are recorded."""

    field: str | None = setting(None, "the JSON field that holds the prompt", advanced=True)
    limit: int | None = setting(None, "record at most this many prompts")
    skip: int = setting(0, "skip this many prompts first", advanced=True)
    batch_size: int = setting(1, "prompts that run together")
    max_prompt_tokens: int | None = setting(None, "leave out longer prompts", advanced=True)
    lookahead: int = setting(0, "also record the gates of this many later layers, applied to each layer's state")
    append: bool = setting(default=False, text="add to the trace if it exists")
    force: bool = setting(default=False, text="replace the trace if it exists")

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("skip", 0), ("batch_size", 1), ("max_prompt_tokens", 1), ("lookahead", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')}: {value} is not at least {least}")
        if self.append and self.force:
            raise ConfigError("--force: replaces the trace, --append adds to it; give one of them")
