"""Every policy in a running model: the output must not depend on what it prefetches and evicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import finemoe
from finemoe.checkpoint import read_headers
from finemoe.checkpoint.headers import fingerprint
from finemoe.errors import ConfigError, FinemoeError
from finemoe.learned.promoe_predictors import save
from finemoe.policy import FACTORIES
from tests.chat_model import make_chat_model
from tests.policy.workload import Shape, untrained
from tests.tiny import aligned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("policies") / "model")


@pytest.fixture(scope="module")
def predictors(folder: Path) -> Path:
    """A file of untrained predictors for this model."""
    path = folder.parent / "predictors.safetensors"
    model = fingerprint(folder, read_headers(sorted(folder.glob("*.safetensors"))))
    save(untrained(Shape(layers=3, experts=8)), path, model)
    return path


@pytest.fixture(scope="module")
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    model = aligned(AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager"))
    return generate(model, prompts)


def generate(model: torch.nn.Module, prompts: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    ids, mask = prompts
    outputs = []
    for _ in range(2):  # the second time, the policy has learned from the first
        output = model.generate(  # type: ignore[operator] # transformers' own
            ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        outputs += [output.sequences, torch.stack(output.logits)]
    return outputs


@pytest.mark.parametrize("policy", FACTORIES)
@pytest.mark.parametrize("budget", ["20%", "50%"])
def test_output_equals_eager_under_every_policy(
    folder: Path,
    predictors: Path,
    prompts: tuple[torch.Tensor, torch.Tensor],
    expected: list[torch.Tensor],
    policy: str,
    budget: str,
) -> None:
    given = predictors if "predictors" in FACTORIES[policy].needs else None
    with finemoe.load(folder, expert_memory=budget, policy=policy, predictors=given, verify=True) as model:
        for found, right in zip(generate(model, prompts), expected, strict=True):
            assert torch.equal(found, right)
        model.finemoe.check_integrity()
        stats = model.finemoe.stats()
        assert stats.hits + stats.late + stats.misses == stats.accesses > 0
        assert stats.prefetched >= stats.prefetched_used + stats.wasted
        if not FACTORIES[policy].prefetches:
            assert stats.prefetched == stats.late == 0


@pytest.mark.parametrize("policy", ["deepspeed", "mixtral-offloading", "expert-map", "finemoe"])
def test_what_a_policy_predicts_is_prefetched_and_used(
    folder: Path, prompts: tuple[torch.Tensor, torch.Tensor], policy: str
) -> None:
    with finemoe.load(folder, expert_memory="50%", policy=policy) as model:
        generate(model, prompts)
        assert model.finemoe.stats().prefetched_used > 0


def test_predictors_are_required_by_their_policy_and_refused_by_others(
    folder: Path, predictors: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--policy promoe: needs --predictors FILE, from finemoe trace train"):
        finemoe.load(folder, policy="promoe")
    with pytest.raises(ConfigError, match="--predictors: --policy lru takes none"):
        finemoe.load(folder, policy="lru", predictors=predictors)
    save(untrained(Shape(layers=3, experts=8)), tmp_path / "other", "another model")
    with pytest.raises(FinemoeError, match="for another model"):
        finemoe.load(folder, policy="promoe", predictors=tmp_path / "other")


def test_an_async_policy_is_idle_while_all_experts_fit_and_none_is_missed(
    folder: Path, prompts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with finemoe.load(folder, expert_memory="all", policy="expert-map") as model:
        ids = prompts[0][:, :2]
        model.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False)
        model.finemoe.reset_stats()
        model.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False)
        stats = model.finemoe.stats()
        assert stats.misses + stats.late == 0
        assert stats.searches < stats.layer_calls / 10


@pytest.mark.parametrize("policy", ["finemoe", "mixtral-offloading"])
def test_a_policy_is_idle_once_everything_is_resident(
    folder: Path, prompts: tuple[torch.Tensor, torch.Tensor], expected: list[torch.Tensor], policy: str
) -> None:
    with finemoe.load(folder, expert_memory="all", policy=policy) as model:
        generate(model, prompts)
        ids = torch.arange(3, 40).repeat(2, 3)
        model.generate(ids, max_new_tokens=60, min_new_tokens=60, do_sample=False)
        assert model.finemoe.stats().resident == model.finemoe.stats().experts
        model.finemoe.reset_stats()
        for found, right in zip(generate(model, prompts), expected, strict=True):
            assert torch.equal(found, right)
        assert model.finemoe.stats().searches <= 1  # the event that the requests have ended
        assert model.finemoe.stats().hit_rate == 1
        model.finemoe.evict_all()
        for found, right in zip(generate(model, prompts), expected, strict=True):
            assert torch.equal(found, right)
        assert model.finemoe.stats().searches > 0 or policy != "finemoe"
