"""Settings of `finemoe bench`. Imports no torch: the command line reads these fields."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import product

from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.maps import NOWHERE
from finemoe.policy import policy_class

BATCHED = "batched_mm"
RESIDENT: tuple[str, ...] = ("eager", BATCHED, "grouped_mm")  # transformers' experts implementations
DISK_OFFLOAD = "disk-offload"
BASELINES: tuple[str, ...] = (*RESIDENT, DISK_OFFLOAD)
_LEAST = {
    "prompt_tokens": 1, "context_tokens": 1, "new_tokens": 2, "offload_tokens": 2, "repeats": 1, "threads": 0,
    "link_probe_mib": 1,
}  # fmt: skip


@dataclass(frozen=True)
class BenchConfig(LoadConfig):
    """What to measure. `expert_memory` and `policy` are lists here; the rest of `LoadConfig` holds for every row."""

    expert_memory: str = field(
        default="25%,50%,75%,all", metadata={"help": "budgets to measure, separated by commas: bytes, shares or all"}
    )
    policy: str = field(default="lfru", metadata={"help": "policies to measure, separated by commas"})
    map_store: str | None = field(
        default="none",
        metadata={"help": "file that rows of policies that learn start from, and add to, one row after the other"},
    )
    baselines: str = field(
        default=",".join(BASELINES),
        metadata={
            "help": "what of transformers to measure beside: experts implementations, with the whole model in memory, "
            "and disk-offload, given the memory of the first budget; none for nothing"
        },
    )
    prompt_tokens: int = field(default=256, metadata={"help": "length of the prompt whose first token is timed"})
    context_tokens: int = field(default=32, metadata={"help": "length of the prompt that is continued"})
    new_tokens: int = field(default=32, metadata={"help": "tokens to continue it by"})
    offload_tokens: int = field(default=3, metadata={"help": "the same for disk-offload, which is slow"})
    repeats: int = field(default=1, metadata={"help": "how often to measure each row, in turn; medians are shown"})
    threads: int = field(default=0, metadata={"help": "torch's threads; 0 leaves the choice to torch"})
    seed: int = field(default=0, metadata={"help": "seed of the prompts' random tokens"})
    link_probe_mib: int = field(default=512, metadata={"help": "MiB to read for each measurement of the disk"})
    offload_dir: str | None = field(
        default=None,
        metadata={"help": "where disk-offload may write its copy of the experts; by default beside temporary files"},
    )
    timeout_s: float = field(default=1800.0, metadata={"help": "give up on a row after this many seconds"})

    def __post_init__(self) -> None:
        for budget, policy in product(self.budgets, self.policies):
            self.load_config(budget, policy)  # checks itself
        if not self.budgets:
            raise ConfigError(f"--expert-memory: {self.expert_memory!r} names no budget")
        if not self.policies:
            raise ConfigError(f"--policy: {self.policy!r} names no policy")
        if unknown := sorted(set(self.baseline_names) - set(BASELINES)):
            raise ConfigError(f"--baselines: {unknown[0]!r} is not one of {', '.join(BASELINES)}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not at least {least}")
        if self.timeout_s <= 0:
            raise ConfigError(f"--timeout-s: {self.timeout_s} is not above 0")

    @property
    def budgets(self) -> tuple[str, ...]:
        return _split(self.expert_memory)

    @property
    def policies(self) -> tuple[str, ...]:
        return _split(self.policy)

    @property
    def baseline_names(self) -> tuple[str, ...]:
        return () if self.baselines.strip() == "none" else _split(self.baselines)

    def load_config(self, budget: str, policy: str) -> LoadConfig:
        """How one row loads its model."""
        values = {f.name: getattr(self, f.name) for f in fields(LoadConfig)}
        store = self.map_store if policy_class(policy).remembers else NOWHERE
        return LoadConfig(**values | {"expert_memory": budget, "policy": policy, "map_store": store})


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
