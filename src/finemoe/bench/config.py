"""Settings of `finemoe bench`. Its flags are generated from these fields, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product

from finemoe.config import EXPERT_DTYPES, REPLAY_HELP, STORED, LoadConfig, setting
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
_PROMPT_SETTINGS = ("prompts_limit", "store", "warm_prompts", "warm_prompts_limit", "prompt_field")
_RANDOM_TOKEN_SETTINGS = ("prompt_tokens", "context_tokens", "offload_tokens")


@dataclass(frozen=True)
class BenchConfig(LoadConfig):
    """What to measure. `expert_memory`, `expert_dtype` and `policy` are lists; other settings hold for all rows."""

    expert_memory: str = setting("25%,50%,75%,all", "budgets to measure, separated by commas: bytes, shares or all")
    expert_dtype: str = setting(
        STORED,
        f"expert dtypes to measure, separated by commas, of {', '.join(EXPERT_DTYPES)}; all but {STORED} are lossy: "
        "their perplexity is measured too",
    )
    policy: str = setting("finemoe", "policies to measure, separated by commas")
    device: str = setting("cpu", "cpu only; scripts/gpu_bench.py measures GPUs", advanced=True)
    map_store: str | None = setting(
        "none", "file of learned maps that rows of learning policies start from and update, in turn", advanced=True
    )
    baselines: str = setting(
        AUTO,
        "rows of transformers, separated by commas: experts implementations with the whole model in memory "
        f"({', '.join(RESIDENT)}), and disk-offload with the memory of the first budget; none; auto is all of them, or "
        "none with --prompts",
    )
    prompt_tokens: int = setting(256, "length of the prompt whose first token is timed", advanced=True)
    context_tokens: int = setting(32, "length of the prompt that is continued", advanced=True)
    new_tokens: int = setting(32, "tokens to generate")
    offload_tokens: int = setting(3, "tokens that disk-offload generates, which is slow", advanced=True)
    prompts: str | None = setting(
        None,
        "answer these prompts instead of random tokens: a file as for finemoe record; answers are greedy, of at most "
        "--new-tokens tokens, and policies keep learning from one to the next",
    )
    prompts_limit: int | None = setting(None, "answer at most this many of --prompts")
    warm_prompts: str | None = setting(
        None, "prompts to answer first, unmeasured, so that policies learn", advanced=True
    )
    warm_prompts_limit: int | None = setting(None, "answer at most this many of --warm-prompts", advanced=True)
    store: str | None = setting(
        None, "a trace of this model, recorded with other prompts, that policies learn from first", advanced=True
    )
    prompt_field: str | None = setting(None, "the JSON field that holds the prompt", advanced=True)
    replay_routing: str | None = setting(None, REPLAY_HELP, advanced=True)
    perplexity: str | None = setting(
        None,
        "also measure the perplexity on this text file; that of lossy rows is always measured, by default on Python's "
        "reference manual",
    )
    perplexity_tokens: int = setting(512, "how many tokens of that text", advanced=True)
    repeats: int = setting(1, "how often to measure each row, in turn; medians are shown")
    threads: int = setting(0, "torch's threads; 0 leaves the choice to torch")
    seed: int = setting(0, "seed of the prompts' random tokens", advanced=True)
    link_probe_mib: int = setting(512, "MiB to read for each measurement of the disk", advanced=True)
    offload_dir: str | None = setting(
        None,
        "where disk-offload writes its copy of the experts (default: the folder for temporary files)",
        advanced=True,
    )
    timeout_s: float = setting(1800.0, "stop a row after this many seconds", advanced=True)

    def __post_init__(self) -> None:
        if self.device != "cpu":
            raise ConfigError(f"--device: bench measures on the CPU, not on {self.device}; see scripts/gpu_bench.py")
        for budget, policy, expert_dtype in product(self.budgets, self.policies, self.expert_dtypes):
            self.load_config(budget, policy, expert_dtype)  # validates itself
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
            raise ConfigError("--map-store: with --replay-routing, maps are not of this model's routing; leave it out")
        self._check_perplexity()
        self._check_predictors()
        self._check_prompt_settings()

    def _check_perplexity(self) -> None:
        """Raises `ConfigError` without a dtype, or for perplexity settings without effect."""
        if not self.expert_dtypes:
            raise ConfigError(f"--expert-dtype: {self.expert_dtype!r} names no dtype")
        if self.perplexity is None and not self.lossy and self.perplexity_tokens != self._default("perplexity_tokens"):
            raise ConfigError("--perplexity-tokens: has no effect without --perplexity FILE or a lossy --expert-dtype")
        if self.replay_routing is not None and self.perplexity is not None:
            raise ConfigError("--perplexity: has no meaning with --replay-routing; leave it out")

    def _check_predictors(self) -> None:
        """Raises `ConfigError` for predictors that no policy takes, or a policy without its predictors."""
        takers = [policy for policy in self.policies if "predictors" in policy_class(policy).needs]
        if takers and self.predictors is None:
            raise ConfigError(f"--policy {takers[0]}: needs --predictors FILE, from finemoe trace train")
        if self.predictors is not None and not takers:
            raise ConfigError(f"--predictors: none of --policy {self.policy} takes any")

    def _check_prompt_settings(self) -> None:
        """Raises `ConfigError` for settings without effect with, or without, `--prompts`."""
        defaults = {f.name: f.default for f in fields(self)}
        given = {name for name, default in defaults.items() if getattr(self, name) != default}
        if self.prompts is None:
            for name in _PROMPT_SETTINGS:
                if name in given:
                    raise ConfigError(f"{_flag(name)}: has no effect without --prompts FILE")
            return
        for name in _RANDOM_TOKEN_SETTINGS:
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
        """Whether some rows quantize experts, so that their answers differ from the checkpoint's."""
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
        """The load settings of one row. Predictors and maps go only to policies that take them."""
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
