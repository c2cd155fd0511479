"""Every family that transformers ships gives exactly its eager answers when offloaded, or a one-line error."""

from pathlib import Path

import pytest
import torch
import transformers

from tests.families.examine import examine
from tests.families.factory import FAMILIES, build, experts_modules, why_not
from tests.families.page import PAGE, documented

LEAST_EXACT = 45


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_exact_or_refused_as_documented(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if reason := why_not(family):
        pytest.skip(reason)
    rows = documented()
    if family not in rows.status and rows.version != transformers.__version__:
        pytest.skip(f"came with transformers {transformers.__version__}")
    verdict = examine(family, dtype, tmp_path)
    if verdict.status == "unusable" and rows.version != transformers.__version__:
        pytest.skip(verdict.why)
    assert verdict.status in ("exact", "refused"), verdict.why
    assert "\n" not in verdict.why
    if rows.version == transformers.__version__:
        assert rows.status[family] == verdict.status, (
            f"{family} is {verdict.status}; run python -m tests.families.page to update {PAGE.name}: {verdict.why}"
        )


def test_page_lists_every_family() -> None:
    rows = documented()
    if rows.version != transformers.__version__:
        pytest.skip(f"{PAGE.name} was written with transformers {rows.version}")
    assert sorted(rows.status) == sorted(FAMILIES)
    assert sum(status == "exact" for status in rows.status.values()) >= LEAST_EXACT


def test_same_seed_builds_the_same_model() -> None:
    one, other = (dict(build("mixtral", torch.float32, seed=3).named_parameters()) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tiny_models_have_more_experts_than_a_token_uses() -> None:
    model = build("mixtral", torch.float32)
    shapes = [tuple(experts.get_parameter("gate_up_proj").shape) for _, experts in experts_modules(model)]
    assert shapes == [(8, 96, 64)] * 4
    assert model.config.num_experts_per_tok == 3
