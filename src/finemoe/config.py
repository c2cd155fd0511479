"""Settings as frozen dataclasses. The CLI's flags are generated from these fields, so names and defaults stand once.

A field's `metadata` holds its help text; a field called `expert_memory` is the flag `--expert-memory`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import Literal

from finemoe.errors import BudgetError, ConfigError

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", start=1):
    _UNITS[f"{_prefix}b"] = 1000**_power
    _UNITS[f"{_prefix}ib"] = 1024**_power
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|cuda:\d+(,cuda:\d+)+")
_SHARE = re.compile(r"(-?\d+(?:\.\d+)?)\s*%")

REPLAY_HELP = (
    "for benchmarks: the trace whose recorded routing is forced onto the model, so that a model of random weights has "
    "real locality; what it says means nothing, and all output says so"
)


@dataclass(frozen=True, slots=True)
class Budget:
    """Expert memory: exactly one of `size_bytes` and `share` (of all routed experts; 1.0 is all of them) is set."""

    size_bytes: int | None = None
    share: float | None = None

    def slots(self, slot_bytes: int, experts: int) -> int:
        """How many experts fit: never more than the budget pays for, never more than there are."""
        if self.share is not None:
            return int(self.share * experts + 1e-9)
        assert self.size_bytes is not None
        return min(experts, self.size_bytes // slot_bytes)


def budget_text(given: object, flag: str = "--expert-memory") -> str:
    """A budget as its flag has it: of Python's numbers an `int` is bytes, a `float` a share.

    Raises:
        BudgetError: a float that is no share, or something else altogether; the message names the flag.
    """
    if isinstance(given, float):
        if not 0 < given <= 1:
            raise BudgetError(f"{flag}: {given!r} is not a share above 0 and at most 1.0; bytes are an int")
        return f"{(Decimal(repr(float(given))) * 100).normalize():f}%"
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise BudgetError(
            f"{flag}: can't use {given!r}; give bytes ('2GiB' or an int), a share ('25%' or the float 0.25) or 'all'"
        )
    return str(given)


def parse_budget(text: str, flag: str = "--expert-memory") -> Budget:
    """Reads `2GiB`, `25%`, `all` or a plain count of bytes.

    Raises:
        BudgetError: not one of these, or zero, negative, above 100%; the message names the flag.
    """
    cleaned = text.strip().lower()
    if cleaned == "all":
        return Budget(share=1.0)
    if share := _SHARE.fullmatch(cleaned):
        value = float(share[1])
        if not 0 < value <= 100:
            raise BudgetError(f"{flag}: {text!r} is not a share between 0% and 100% of the routed experts")
        return Budget(share=value / 100)
    if cleaned.startswith("-"):
        raise BudgetError(f"{flag}: {text!r} is negative; give bytes (2GiB), a share (25%) or all")
    size = _read_size(cleaned)
    if size is None:
        raise BudgetError(f"{flag}: can't read {text!r}; give bytes (2GiB, 800MB), a share (25%) or all")
    if size < 1:
        raise BudgetError(f"{flag}: {text!r} is no memory at all; give bytes (2GiB), a share (25%) or all")
    return Budget(size_bytes=int(size))


def refuse_undecodable(text: str, name: str) -> None:
    """Raises `ConfigError` for text that was no UTF-8 where it came from: such bytes are lone surrogates in Python."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: is not valid UTF-8") from error


def parse_bytes(text: str, flag: str) -> int:
    """Reads `2GiB`, `800MB` or a plain count of bytes.

    Raises:
        ConfigError: not one of these, or nothing at all; the message names `flag`.
    """
    size = _read_size(text)
    if size is None:
        raise ConfigError(f"{flag}: can't read {text!r}; give bytes (2GiB, 800MB)")
    if size < 1:
        raise ConfigError(f"{flag}: {text!r} is no memory at all; give bytes (2GiB, 800MB)")
    return int(size)


def _read_size(text: str) -> Decimal | None:
    """Bytes; `None` if this is no size."""
    size = _SIZE.fullmatch(text.strip().lower())
    return None if size is None or size[2] not in _UNITS else Decimal(size[1]) * _UNITS[size[2]]


def format_bytes(count: float) -> str:
    """A byte count for people, in binary units: `1.1 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_bandwidth(text: str) -> float:
    """Reads `500MiB`, `1.5GB/s` or a plain count of bytes, in bytes/s.

    Raises:
        ConfigError: not one of these, or nothing at all; the message names `--link-bandwidth`.
    """
    size = _read_size(text.strip().lower().removesuffix("/s"))
    if size is None:
        raise ConfigError(f"--link-bandwidth: can't read {text!r}; give bytes per second (500MiB, 1.5GB)")
    if size < 1:
        raise ConfigError(f"--link-bandwidth: {text!r} moves nothing; give bytes per second (500MiB, 1.5GB)")
    return float(size)


STORED = "stored"  # experts as the checkpoint has them
EXPERT_DTYPES = (STORED, "int8", "int4")


@dataclass(frozen=True)
class LoadConfig:
    """Which model to load, and how its experts are kept."""

    model: str | None = field(
        default=None, metadata={"help": "folder or Hugging Face hub id; by default the built-in reference model"}
    )
    revision: str | None = field(default=None, metadata={"help": "hub revision (branch, tag or commit)"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "compute in this dtype; auto takes the checkpoint's"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run modelling code that the model repo ships"})
    expert_memory: str = field(
        default="25%", metadata={"help": "hard limit for resident experts: bytes (2GiB), a share (25%) or all"}
    )
    device: str = field(
        default="auto",
        metadata={
            "help": "where the model runs and --expert-memory is: cpu, cuda, one or several devices "
            "(cuda:0,cuda:1), or auto: cuda where there is one"
        },
    )
    host_memory: str | None = field(
        default=None,
        metadata={
            "help": "on a GPU: pinned host memory for experts between disk and GPU: bytes, a share or all (default: "
            "all, or as many as fit)"
        },
    )
    expert_kernel: Literal["auto", "eager", "grouped_mm"] = field(
        default="auto",
        metadata={
            "help": "on a GPU: whose arithmetic experts are computed with, of transformers' implementations; auto is "
            "grouped_mm where its results do not depend on what was resident, else eager"
        },
    )
    host_compute: Literal["off", "auto"] = field(
        default="off",
        metadata={
            "help": "on a GPU: auto computes missing experts of few tokens on the CPU where that is faster than "
            "to copy them; answers then differ in rounding, by what was resident"
        },
    )
    expert_dtype: str = field(
        default=STORED,
        metadata={
            "help": f"one of {', '.join(EXPERT_DTYPES)}: int8 and int4 keep and move the experts of an unquantized "
            "checkpoint in fewer bits, which is lossy; a copy is made once, in the cache folder; all output says so"
        },
    )
    policy: str = field(
        default="finemoe",
        metadata={
            "help": "what to keep and what to fetch: finemoe, lru, lfu, lfru, or a published system's policy "
            "(docs/simulator.md)"
        },
    )
    predictors: str | None = field(default=None, metadata={"help": "what finemoe trace train wrote, for promoe"})
    map_store: str | None = field(
        default=None,
        metadata={
            "help": "file that a policy that learns starts from, and leaves what it learned in; none for nothing "
            "(default: one for each model and policy in the cache folder)"
        },
    )
    io: Literal["auto", "direct", "buffered"] = field(
        default="auto", metadata={"help": "how experts are read; direct bypasses the page cache, auto does if it can"}
    )
    reader_threads: int = field(default=4, metadata={"help": "threads that read experts"})
    link_bandwidth: str | None = field(
        default=None,
        metadata={
            "help": "for experiments: move experts no faster than this many bytes per second (500MiB), as over a "
            "slower link; all output says so"
        },
    )
    explain: bool = field(
        default=False,
        metadata={"help": "tell by layer and by source what was predicted, hit, late, missed and wasted"},
    )
    verify: bool = field(
        default=False, metadata={"help": "debug: re-read every landed expert by a second path and compare"}
    )

    @property
    def link_bandwidth_bytes_s(self) -> float | None:
        """What the link is held to; `None` where it is not."""
        return None if self.link_bandwidth is None else parse_bandwidth(self.link_bandwidth)

    @property
    def lossy(self) -> bool:
        """Whether experts are kept in fewer bits than the checkpoint's, so that answers are not its own."""
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
        for name, allowed in (
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("io", ("auto", "direct", "buffered")),
            ("expert_kernel", ("auto", "eager", "grouped_mm")),
            ("host_compute", ("off", "auto")),
            ("expert_dtype", EXPERT_DTYPES),
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
        """Raises `ConfigError` where something was set that means nothing on the CPU."""
        defaults = {each.name: each.default for each in fields(self)}
        for name in ("host_memory", "expert_kernel", "host_compute"):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"--{name.replace('_', '-')}: has no effect on the CPU; give --device cuda too")

    def refuse_cpu_settings(self) -> None:
        """Raises `ConfigError` where something was set that is for the CPU alone."""
        if self.link_bandwidth is not None:
            raise ConfigError("--link-bandwidth: is for experiments on the CPU; give --device cpu too")


_MOST_SEED = 2**63 - 1  # that torch takes everywhere


@dataclass(frozen=True)
class GenerateConfig:
    """How to continue a prompt. Greedy unless a temperature is given."""

    max_new_tokens: int = field(default=128, metadata={"help": "stop after this many tokens"})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy; above, sampling at this temperature"})
    top_p: float = field(default=1.0, metadata={"help": "sample from the smallest set of this probability"})
    seed: int = field(default=0, metadata={"help": "seed of the sampling"})
    raw: bool = field(default=False, metadata={"help": "give the prompt as it is, without the chat template"})

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens: {self.max_new_tokens} is not at least 1")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"--temperature: {self.temperature} is not between 0 and 100")
        if not 0 <= self.seed <= _MOST_SEED:
            raise ConfigError(f"--seed: {self.seed} is not between 0 and {_MOST_SEED}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p: {self.top_p} is not above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise ConfigError("--top-p: has no effect without sampling; give --temperature too")


@dataclass(frozen=True)
class PrefillConfig:
    """How a prompt is read."""

    prefill_chunk: int | None = field(
        default=None,
        metadata={
            "help": "read a prompt so many tokens at a time: less memory for a long one, but every piece needs its "
            "experts again, and in bfloat16 tokens may differ by rounding from those of a prompt read whole, as with "
            "transformers' own chunked prefill (default: whole)"
        },
    )

    def __post_init__(self) -> None:
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"--prefill-chunk: {self.prefill_chunk} is not at least 1")


@dataclass(frozen=True)
class ReplayConfig:
    """Routing from a file instead of the model's own."""

    replay_routing: str | None = field(default=None, metadata={"help": REPLAY_HELP})


@dataclass(frozen=True)
class RecordConfig:
    """Which prompts to record, how many together, and how far the gates look ahead."""

    field: str | None = dataclasses.field(default=None, metadata={"help": "the JSON field that holds the prompt"})
    limit: int | None = dataclasses.field(default=None, metadata={"help": "record at most this many prompts"})
    skip: int = dataclasses.field(default=0, metadata={"help": "pass over this many prompts first"})
    batch_size: int = dataclasses.field(default=1, metadata={"help": "prompts that run together"})
    max_prompt_tokens: int | None = dataclasses.field(default=None, metadata={"help": "leave longer prompts out"})
    lookahead: int = dataclasses.field(
        default=0, metadata={"help": "record what the gates of this many later layers make of each layer's state"}
    )
    append: bool = dataclasses.field(default=False, metadata={"help": "add to the trace if it exists"})
    force: bool = dataclasses.field(default=False, metadata={"help": "replace the trace if it exists"})

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("skip", 0), ("batch_size", 1), ("max_prompt_tokens", 1), ("lookahead", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')}: {value} is not at least {least}")
        if self.append and self.force:
            raise ConfigError("--force: replaces the trace, --append adds to it; give one of them")
