"""Settings of `finemoe bench`. Imports no torch: the command line reads these fields."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import product

from finemoe.config import EXPERT_DTYPES, REPLAY_HELP, STORED, LoadConfig
from finemoe.errors import ConfigError
from finemoe.learned import NO_MAP_STORE
from finemoe.policy import policy_class

BATCHED = "batched_mm"
RESIDENT: tuple[str, ...] = ("eager", BATCHED, "grouped_mm")  # transformers' experts implementations
DISK_OFFLOAD = "disk-offload"
AUTO = "auto"
BASELINES: tuple[str, ...] = (*RESIDENT, DISK_OFFLOAD)
_LEAST = {
    "prompt_tokens": 1, "context_tokens": 1, "new_tokens": 2, "offload_tokens": 2, "repeats": 1, "threads": 0,
    "link_probe_mib": 1, "perplexity_tokens": 2, "prompts_limit": 1, "warm_prompts_limit": 1,
}  # fmt: skip
_OF_PROMPTS = ("prompts_limit", "store", "warm_prompts", "warm_prompts_limit", "prompt_field")
_OF_RANDOM_TOKENS = ("prompt_tokens", "context_tokens", "offload_tokens")


@dataclass(frozen=True)
class BenchConfig(LoadConfig):
    """What to measure. `expert_memory` and `policy` are lists here; the rest of `LoadConfig` holds for every row."""

    expert_memory: str = field(
        default="25%,50%,75%,all", metadata={"help": "budgets to measure, separated by commas: bytes, shares or all"}
    )
    expert_dtype: str = field(
        default=STORED,
        metadata={
            "help": f"expert dtypes to measure, separated by commas, of {', '.join(EXPERT_DTYPES)}; all but {STORED} "
            "are lossy, and measured in perplexity too"
        },
    )
    policy: str = field(default="finemoe", metadata={"help": "policies to measure, separated by commas"})
    device: str = field(default="cpu", metadata={"help": "cpu; GPUs are measured by scripts/gpu_bench.py"})
    map_store: str | None = field(
        default="none",
        metadata={"help": "file that rows of policies that learn start from, and add to, one row after the other"},
    )
    baselines: str = field(
        default=AUTO,
        metadata={
            "help": "what of transformers to measure beside: experts implementations, with the whole model in memory "
            f"({', '.join(RESIDENT)}), and disk-offload, given the memory of the first budget; none for nothing; auto "
            "for all of them, or with --prompts for none"
        },
    )
    prompt_tokens: int = field(default=256, metadata={"help": "length of the prompt whose first token is timed"})
    context_tokens: int = field(default=32, metadata={"help": "length of the prompt that is continued"})
    new_tokens: int = field(default=32, metadata={"help": "tokens to continue it by"})
    offload_tokens: int = field(default=3, metadata={"help": "the same for disk-offload, which is slow"})
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "instead of random tokens, answer these prompts: a file as for finemoe record; each answer is "
            "greedy, of at most --new-tokens tokens, and the policies learn from one to the next"
        },
    )
    prompts_limit: int | None = field(default=None, metadata={"help": "answer at most this many of --prompts"})
    warm_prompts: str | None = field(
        default=None, metadata={"help": "prompts to answer first, unmeasured, for policies that learn"}
    )
    warm_prompts_limit: int | None = field(default=None, metadata={"help": "at most this many of --warm-prompts"})
    store: str | None = field(
        default=None,
        metadata={
            "help": "a recorded trace of this model, of other prompts, that policies which learn take in first, as the "
            "simulator's do",
        },
    )
    prompt_field: str | None = field(default=None, metadata={"help": "the JSON field that holds the prompt"})
    replay_routing: str | None = field(default=None, metadata={"help": REPLAY_HELP})
    perplexity: str | None = field(
        default=None,
        metadata={
            "help": "measure the perplexity on this text file, too; lossy rows are measured without being asked, on "
            "Python's reference manual"
        },
    )
    perplexity_tokens: int = field(default=512, metadata={"help": "how many tokens of that text"})
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
        if self.device != "cpu":
            raise ConfigError(f"--device: bench measures on the CPU, not on {self.device}; see scripts/gpu_bench.py")
        for budget, policy, expert_dtype in product(self.budgets, self.policies, self.expert_dtypes):
            self.load_config(budget, policy, expert_dtype)  # checks itself
        if not self.budgets:
            raise ConfigError(f"--expert-memory: {self.expert_memory!r} names no budget")
        if not self.policies:
            raise ConfigError(f"--policy: {self.policy!r} names no policy")
        if unknown := sorted(set(self.baseline_names) - set(BASELINES)):
            raise ConfigError(f"--baselines: {unknown[0]!r} is not one of {', '.join(BASELINES)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{_flag(name)}: {value} is not at least {least}")
        if self.timeout_s <= 0:
            raise ConfigError(f"--timeout-s: {self.timeout_s} is not above 0")
        if self.replay_routing is not None and self.map_store != NO_MAP_STORE:
            raise ConfigError("--map-store: maps of --replay-routing are not this model's; leave it out")
        self._check_perplexity()
        self._check_predictors()
        self._check_requests()

    def _check_perplexity(self) -> None:
        """Refuses no dtype at all, and flags of perplexity where it is not measured, or means nothing."""
        if not self.expert_dtypes:
            raise ConfigError(f"--expert-dtype: {self.expert_dtype!r} names no dtype")
        if self.perplexity is None and not self.lossy and self.perplexity_tokens != self._default("perplexity_tokens"):
            raise ConfigError("--perplexity-tokens: has no effect without --perplexity FILE or a lossy --expert-dtype")
        if self.replay_routing is not None and self.perplexity is not None:
            raise ConfigError("--perplexity: means nothing with --replay-routing, which answers nonsense; leave it out")

    def _check_predictors(self) -> None:
        """Refuses predictors that no policy takes, and a policy that lacks them."""
        takers = [policy for policy in self.policies if "predictors" in policy_class(policy).needs]
        if takers and self.predictors is None:
            raise ConfigError(f"--policy {takers[0]}: needs --predictors FILE, from finemoe trace train")
        if self.predictors is not None and not takers:
            raise ConfigError(f"--predictors: none of --policy {self.policy} takes any")

    def _check_requests(self) -> None:
        """No flag is ignored: refuses those that mean nothing with, or without, `--prompts`."""
        defaults = {f.name: f.default for f in fields(self)}
        given = {name for name, default in defaults.items() if getattr(self, name) != default}
        if self.prompts is None:
            for name in _OF_PROMPTS:
                if name in given:
                    raise ConfigError(f"{_flag(name)}: has no effect without --prompts FILE")
            return
        for name in _OF_RANDOM_TOKENS:
            if name in given:
                raise ConfigError(f"{_flag(name)}: has no effect with --prompts")
        if self.warm_prompts_limit is not None and self.warm_prompts is None:
            raise ConfigError("--warm-prompts-limit: has no effect without --warm-prompts FILE")
        if DISK_OFFLOAD in self.baseline_names:
            raise ConfigError(
                f"--baselines: {DISK_OFFLOAD} is not measured with --prompts; choose of {', '.join(RESIDENT)}"
            )

    @classmethod
    def _default(cls, name: str) -> object:
        return next(f.default for f in fields(cls) if f.name == name)

    @property
    def expert_dtypes(self) -> tuple[str, ...]:
        return _split(self.expert_dtype)

    @property
    def lossy(self) -> bool:
        """Whether some rows' answers are not the checkpoint's own."""
        return any(name != STORED for name in self.expert_dtypes)

    @property
    def budgets(self) -> tuple[str, ...]:
        return _split(self.expert_memory)

    @property
    def policies(self) -> tuple[str, ...]:
        return _split(self.policy)

    @property
    def baseline_names(self) -> tuple[str, ...]:
        named = self.baselines.strip()
        if named == AUTO:
            return BASELINES if self.prompts is None else ()
        return () if named == "none" else _split(named)

    def load_config(self, budget: str, policy: str, expert_dtype: str = STORED) -> LoadConfig:
        """How one row loads its model. Predictors go to the policies that take them."""
        values = {f.name: getattr(self, f.name) for f in fields(LoadConfig)}
        if "predictors" not in policy_class(policy).needs:
            values["predictors"] = None
        if not policy_class(policy).is_persistent:
            values["map_store"] = NO_MAP_STORE
        return LoadConfig(**values | {"expert_memory": budget, "policy": policy, "expert_dtype": expert_dtype})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
