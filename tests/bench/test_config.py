from __future__ import annotations

import subprocess
import sys

import pytest

from finemoe.bench import BenchConfig
from finemoe.bench.measurements import variants
from finemoe.errors import BudgetError, ConfigError


def test_rows_are_all_budgets_of_all_policies_then_the_baselines() -> None:
    config = BenchConfig(expert_memory="25%, all", policy="lru,lfu", baselines="eager,disk-offload")
    assert [variant.name for variant in variants(config)] == [
        "finemoe lru 25%",
        "finemoe lru all",
        "finemoe lfu 25%",
        "finemoe lfu all",
        "transformers eager",
        "transformers disk offload",
    ]


def test_baselines_can_be_left_out() -> None:
    assert all(variant.kind == "finemoe" for variant in variants(BenchConfig(baselines="none")))


def test_a_budget_named_twice_is_measured_once() -> None:
    assert len(variants(BenchConfig(expert_memory="25%,25%", baselines="none"))) == 1


def test_a_row_loads_as_the_settings_say() -> None:
    load = BenchConfig(model="m", reader_threads=2, expert_memory="25%,all").load_config("all", "lru")
    assert (load.model, load.reader_threads, load.expert_memory, load.policy) == ("m", 2, "all", "lru")


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"baselines": "fast"}, "--baselines"),
        ({"policy": ","}, "--policy"),
        ({"expert_memory": ""}, "--expert-memory"),
        ({"new_tokens": 1}, "--new-tokens"),
        ({"prompt_tokens": 0}, "--prompt-tokens"),
        ({"repeats": 0}, "--repeats"),
        ({"threads": -1}, "--threads"),
        ({"timeout_s": 0.0}, "--timeout-s"),
        ({"reader_threads": 0}, "--reader-threads"),
        ({"replay_routing": "t", "map_store": "m"}, "--map-store"),
    ],
)
def test_a_bad_value_is_refused_naming_its_flag(values: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        BenchConfig(**values)  # type: ignore[arg-type]


def test_every_budget_of_a_list_is_checked() -> None:
    with pytest.raises(BudgetError, match="--expert-memory"):
        BenchConfig(expert_memory="25%,120%")


def test_settings_import_no_torch() -> None:
    code = "import sys, finemoe.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_maps_are_kept_only_with_a_file_and_a_learning_policy() -> None:
    assert BenchConfig().load_config("25%", "finemoe").map_store == "none"
    named = BenchConfig(policy="lru,finemoe", map_store="m")
    assert [named.load_config("25%", policy).map_store for policy in named.policies] == ["none", "m"]


def test_lossy_rows_are_named_as_such() -> None:
    config = BenchConfig(expert_memory="50%,all", expert_dtype="stored,int8", baselines="none")
    rows = variants(config)
    assert [row.name for row in rows] == [
        "finemoe finemoe 50%", "finemoe finemoe all", "finemoe finemoe 50% int8", "finemoe finemoe all int8"
    ]  # fmt: skip
    assert [row.lossy for row in rows] == [False, False, True, True]
    assert config.lossy
    assert config.load_config("all", "lru", "int8").expert_dtype == "int8"


def test_perplexity_flags_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--expert-dtype: 'int3' is not one of"):
        BenchConfig(expert_dtype="stored,int3")
    with pytest.raises(ConfigError, match=r"^--expert-dtype: ',' names no dtype"):
        BenchConfig(expert_dtype=",")
    with pytest.raises(ConfigError, match=r"^--perplexity-tokens: has no effect"):
        BenchConfig(perplexity_tokens=64)
    assert BenchConfig(perplexity_tokens=64, expert_dtype="int4").lossy
