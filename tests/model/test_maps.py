"""Learned maps persist: saved on close, restored by the next load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finemoe
from finemoe.checkpoint import read_headers
from finemoe.checkpoint.headers import fingerprint
from finemoe.engine.async_policy import AsyncPolicy
from finemoe.errors import ConfigError, FinemoeWarning
from finemoe.learned import read_maps
from finemoe.policy import FACTORIES
from tests.learned.make import PERSISTENT, make_file


def generate(model: Any, seed: int = 0, tokens: int = 8) -> None:
    ids = torch.randint(3, 40, (1, 4), generator=torch.Generator().manual_seed(seed))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens)


def state_dict(model: Any) -> dict[str, Any]:
    policy = model.finemoe._engine.cache_manager.policy
    assert isinstance(policy, AsyncPolicy)
    policy.flush()
    policy.inner.begin(())
    return policy.inner.state_dict()


def fingerprint_of(folder: Path) -> str:
    return fingerprint(folder, read_headers(sorted(folder.glob("*.safetensors"))))


@pytest.mark.parametrize("policy", PERSISTENT)
def test_a_policy_starts_from_the_maps_of_the_previous_load(chat_folder: Path, tmp_path: Path, policy: str) -> None:
    path = tmp_path / "maps"
    with finemoe.load(chat_folder, policy=policy, map_store=path) as model:
        generate(model)
        learned = state_dict(model)
        assert not path.exists()
    assert read_maps(path).model == fingerprint_of(chat_folder)
    with finemoe.load(chat_folder, policy=policy, map_store=path) as model:
        for name, array in state_dict(model).items():
            np.testing.assert_array_equal(array, learned[name])
        generate(model, seed=1)
    assert len(read_maps(path)) > len(learned["tokens"])


def test_a_ctrl_c_while_closing_loses_no_maps(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = finemoe.load(chat_folder, policy="expert-map", map_store=tmp_path / "maps")
    generate(model)
    transfer = model.finemoe._engine.transfer
    close = transfer.close

    def interrupted() -> None:
        close()
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.close()
    assert len(read_maps(tmp_path / "maps")) > 0
    assert model.finemoe._store._descriptors == []
    model.close()


def test_each_model_and_policy_has_a_default_file(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINEMOE_MAPS", str(tmp_path))
    for policy in FACTORIES:
        if "predictors" in FACTORIES[policy].needs:
            continue
        with finemoe.load(chat_folder, policy=policy) as model:
            generate(model)
    model = fingerprint_of(chat_folder)
    assert {path.name for path in tmp_path.iterdir()} == {f"{model}-{policy}.safetensors" for policy in PERSISTENT}


@pytest.mark.parametrize("cache", ["FINEMOE_CACHE", "XDG_CACHE_HOME"])
def test_default_files_are_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    from finemoe.system import user_cache, user_maps

    monkeypatch.setenv("FINEMOE_MAPS", "none")
    assert user_maps() is None
    for name in ("FINEMOE_MAPS", "FINEMOE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(cache, str(tmp_path))
    assert user_maps() == user_cache() / "maps"


def test_nothing_is_saved_with_none_or_when_nothing_was_learned(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINEMOE_MAPS", str(tmp_path))
    with finemoe.load(chat_folder, policy="finemoe", map_store="none") as model:
        generate(model)
    finemoe.load(chat_folder, policy="finemoe").close()
    assert not list(tmp_path.iterdir())
    with finemoe.load(chat_folder, policy="finemoe") as model:
        generate(model)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns, path.stat().st_ino
    finemoe.load(chat_folder, policy="finemoe").close()
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written


def test_a_chosen_file_that_does_not_fit_is_refused(chat_folder: Path, tmp_path: Path) -> None:
    own = fingerprint_of(chat_folder)
    foreign = make_file(tmp_path / "foreign", model="feedfacefeedface")
    with pytest.raises(ConfigError, match=rf"--map-store: .*foreign .*feedfacefeedface.*{own}.*; give another"):
        finemoe.load(chat_folder, policy="finemoe", map_store=foreign)
    other = make_file(tmp_path / "other", "expert-map", model=own)
    with pytest.raises(ConfigError, match=r"--map-store: .*other has maps of --policy expert-map, this is finemoe"):
        finemoe.load(chat_folder, policy="finemoe", map_store=other)
    (tmp_path / "diary").write_text("dear diary")
    with pytest.raises(ConfigError, match=r"--map-store: .*not a file of expert maps"):
        finemoe.load(chat_folder, policy="finemoe", map_store=tmp_path / "diary")
    with pytest.raises(ConfigError, match=r"--map-store: .*is a folder"):
        finemoe.load(chat_folder, policy="finemoe", map_store=tmp_path)
    with pytest.raises(ConfigError, match=r"--map-store: there is no folder .*nowhere; make it"):
        finemoe.load(chat_folder, policy="finemoe", map_store=tmp_path / "nowhere" / "maps")
    with pytest.raises(ConfigError, match="--map-store: --policy lru learns no maps"):
        finemoe.load(chat_folder, policy="lru", map_store=foreign)
    finemoe.load(chat_folder, policy="lru", map_store="none").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary", "foreign", "other"]


@pytest.mark.parametrize("chosen", [True, False])
def test_a_damaged_file_is_moved_away_and_generation_works(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: bool
) -> None:
    monkeypatch.setenv("FINEMOE_MAPS", str(tmp_path))
    path = make_file(tmp_path / f"{fingerprint_of(chat_folder)}-finemoe.safetensors", model=fingerprint_of(chat_folder))
    path.write_bytes(path.read_bytes()[:-9])
    damaged = path.read_bytes()
    with pytest.warns(FinemoeWarning, match=r"damaged .*; moved to .*\.damaged, starting empty"):
        model = finemoe.load(chat_folder, policy="finemoe", map_store=path if chosen else None)
    generate(model)
    model.close()
    assert path.with_name(f"{path.name}.damaged").read_bytes() == damaged
    assert len(read_maps(path)) > 0


def test_a_default_file_of_another_model_is_moved_away_and_one_that_holds_no_maps_is_left_alone(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINEMOE_MAPS", str(tmp_path))
    path = make_file(tmp_path / f"{fingerprint_of(chat_folder)}-finemoe.safetensors", model="feedfacefeedface")
    with pytest.warns(FinemoeWarning, match="feedfacefeedface.* moved to"):
        finemoe.load(chat_folder, policy="finemoe").close()
    path.write_bytes(b"something else")
    with (
        pytest.warns(FinemoeWarning, match="not a file of expert maps.*going on without"),
        finemoe.load(chat_folder, policy="finemoe") as model,
    ):
        generate(model)
    assert path.read_bytes() == b"something else"


def test_a_file_of_another_shape_than_the_model_is_not_restored(chat_folder: Path, tmp_path: Path) -> None:
    path = make_file(tmp_path / "m", model=fingerprint_of(chat_folder))  # 6 experts a layer, the model has 8
    with pytest.warns(FinemoeWarning, match="of another shape than the model"):
        finemoe.load(chat_folder, policy="finemoe", map_store=path).close()


def test_maps_that_can_not_be_written_are_a_warning(chat_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    model = finemoe.load(chat_folder, policy="finemoe", map_store=tmp_path / "gone" / "maps")
    generate(model)
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").write_text("")
    with pytest.warns(FinemoeWarning, match="can't be written .*what was learned is lost"):
        model.close()


def test_maps_are_saved_when_the_interpreter_exits(chat_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch, finemoe\n"
        "model = finemoe.load(sys.argv[1], policy='finemoe', map_store=sys.argv[2])\n"
        "model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=4, min_new_tokens=4)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(chat_folder), str(tmp_path / "maps")], check=True, timeout=280)
    assert len(read_maps(tmp_path / "maps")) == 3
