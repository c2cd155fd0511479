"""Training of predictors, and their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finemoe.errors import FinemoeError
from finemoe.learned.promoe_predictors import load, recall, save, train
from finemoe.policy.published.promoe import Predictors, ProMoEPolicy
from finemoe.types import DECODE, Recorded, Routed, Step
from tests.policy.workload import Shape, selected, softmax, untrained

SHAPE = Shape(layers=4, experts=6, active=2)


def predictable(seed: int, length: int = 40) -> Recorded:
    """Each layer's routing follows from the layer before it; the first layer's is new in every iteration."""
    random = np.random.default_rng(seed)
    logits = np.zeros((length, SHAPE.layers, SHAPE.experts))
    logits[:, 0] = 3 * random.normal(size=(length, SHAPE.experts))
    for layer in range(1, SHAPE.layers):
        logits[:, layer] = np.roll(logits[:, layer - 1], layer, axis=1)
    gates = softmax(logits)
    return Recorded(np.full(length, DECODE, np.uint8), np.zeros(length, np.int32), gates, selected(gates, SHAPE.active))


@pytest.fixture(scope="module")
def trained() -> Predictors:
    return train(
        (predictable(seed) for seed in range(60)), SHAPE.layers, SHAPE.experts, epochs=60, hidden=32, history=2
    )


def test_only_predictable_layers_are_learned(trained: Predictors) -> None:
    found = recall(trained, [predictable(1000 + seed) for seed in range(5)])
    assert (found[:2] > 0.9).all()  # predict layers 2 and 3
    assert (found[2:] < 0.6).all()  # predict the next iteration's first layers, which are random


def test_the_policy_reaches_the_recall_of_its_predictors(trained: Predictors) -> None:
    """So it feeds them the same inputs as training does."""
    request = predictable(2000)
    policy = ProMoEPolicy(SHAPE.layers, SHAPE.experts, trained, SHAPE.active)
    hits = needs = 0
    for i in range(len(request.token_ids)):
        policy.begin([Step(0, DECODE, request.token_ids[i : i + 1])])
        for layer in range(SHAPE.layers):
            needed = np.flatnonzero(request.executed[i, layer])
            if layer >= trained.stride:
                hits += int((policy.prefetch_priority[layer, needed] > 0).sum())
                needs += len(needed)
            policy.routed(Routed(layer, tuple(needed.tolist()), request.gates[i : i + 1, layer]))
    assert hits / needs == pytest.approx(recall(trained, [request])[:2].mean(), abs=0.05)


def test_equal_seeds_train_equal_predictors() -> None:
    twins = [train([predictable(0)], SHAPE.layers, SHAPE.experts, seed=3, epochs=1, hidden=4) for _ in range(2)]
    other = train([predictable(0)], SHAPE.layers, SHAPE.experts, seed=4, epochs=1, hidden=4)
    assert np.array_equal(twins[0].inner, twins[1].inner)
    assert not np.array_equal(twins[0].inner, other.inner)


def test_progress_is_reported_to_the_end() -> None:
    reported: list[tuple[int, int]] = []
    train([predictable(0)], 4, 6, epochs=2, hidden=4, progress=lambda done, steps, _: reported.append((done, steps)))
    assert reported == [(1, 2), (2, 2)]


def test_requests_of_one_iteration_are_refused() -> None:
    with pytest.raises(FinemoeError, match="two iterations or more"):
        train([predictable(0, length=1)], SHAPE.layers, SHAPE.experts)


def test_round_trip(tmp_path: Path) -> None:
    saved = untrained(SHAPE)
    save(saved, tmp_path / "new" / "predictors.safetensors", "a model")
    loaded = load(tmp_path / "new" / "predictors.safetensors", "a model")
    assert (loaded.stride, loaded.history) == (saved.stride, saved.history)
    for ours, theirs in zip(saved[:4], loaded[:4], strict=True):
        assert np.array_equal(ours, theirs)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["predictors.safetensors"]


def test_predictors_for_another_model_are_refused(tmp_path: Path) -> None:
    save(untrained(SHAPE), tmp_path / "p", "a model")
    assert load(tmp_path / "p").layers == SHAPE.layers
    with pytest.raises(FinemoeError, match=r"p: predictors for another model \(a model\)"):
        load(tmp_path / "p", "another")


@pytest.mark.parametrize("position", [0, 5, 60, -1000, -1, None])
def test_a_damaged_file_is_refused(tmp_path: Path, position: int | None) -> None:
    path = tmp_path / "p"
    save(untrained(SHAPE), path, "m")
    content = bytearray(path.read_bytes())
    if position is None:
        del content[-100:]
    else:
        content[position] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(FinemoeError, match="train them again"):
        load(path, "m")


@pytest.mark.parametrize("about", [None, "", "[]", '{"stride": 2}'])
def test_a_damaged_header_is_refused(tmp_path: Path, about: str | None) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "p"
    save(untrained(SHAPE), path, "m")
    metadata = {"format": "finemoe predictors 1", "model": "m"} | ({} if about is None else {"about": about})
    save_file(load_file(path), path, metadata)
    with pytest.raises(FinemoeError, match=r"p: the predictors are damaged .*; train them again"):
        load(path, "m")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FinemoeError, match="train them again"):
        load(tmp_path / "nothing")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "x")
    with pytest.raises(FinemoeError, match="not a file of predictors"):
        load(tmp_path / "x")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p"
    save(untrained(SHAPE), path, "old")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("finemoe.system.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(untrained(SHAPE), path, "new")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
