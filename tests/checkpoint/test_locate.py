"""Locating a model's files: errors name the missing file, and the flag."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finemoe.checkpoint import locate
from finemoe.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def refused(model: Path | str, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(str(model), revision)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_single_file_or_the_shards_of_the_index_are_found(folder: Path) -> None:
    shards = [folder / f"{name}.safetensors" for name in "ab"]
    for shard in shards:
        shard.touch()
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"y": "b.safetensors", "x": "a.safetensors", "z": "a.safetensors"}})
    )
    assert locate(str(folder)).files == tuple(shards)
    (folder / "model.safetensors").touch()
    assert locate(str(folder)).files == (folder / "model.safetensors",)  # as in transformers


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere") == f"--model: there is no folder {tmp_path / 'nowhere'}"
    assert "there is no folder ./nowhere" in refused("./nowhere")
    assert "there is no folder ~/no/where" in refused("~/no/where")


def test_a_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.touch()
    assert refused(path) == f"--model: {path} is a file; give the folder that holds config.json"


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path)


def test_a_folder_without_safetensors_is_refused_and_its_weights_are_named(folder: Path) -> None:
    assert f"has neither model.safetensors nor {INDEX}" in refused(folder)
    (folder / "pytorch_model.bin").touch()
    assert "it has pytorch_model.bin; only safetensors are read" in refused(folder)


def test_an_index_that_names_a_missing_shard_is_refused(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    assert refused(folder).startswith(f"{folder / 'gone.safetensors'}: the index names this shard, but it is missing")


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}', "\0"])
def test_a_damaged_index_is_named(folder: Path, index: str) -> None:
    (folder / INDEX).write_text(index)
    assert refused(folder).startswith(f"{folder / INDEX}: not a valid safetensors index")


def test_an_empty_index_is_refused(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {}}')
    refused(folder)


@pytest.mark.parametrize(
    "model", ["no-such-model-here", "nobody/no-such-model-here", "not a hub id!", "a--b/..", "a/b/c"]
)
def test_neither_a_folder_nor_a_hub_id_is_refused_in_one_line(model: str) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert refused(model).startswith("--model: ")


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").touch()
    assert refused(folder, "main").startswith(f"--revision: {folder} is a folder on this machine")
