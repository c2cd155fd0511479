"""The file of expert maps: round trips, damage, and validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from finemoe.errors import DamagedMapsError, MapsError
from finemoe.learned import Maps, read_maps, write_maps
from finemoe.learned.file import check_arrays
from finemoe.learned.maps import ROW_ARRAYS
from finemoe.policy import make_policy
from tests.learned.make import PERSISTENT, SHAPE, make_file, make_maps
from tests.policy.workload import workload


@pytest.mark.parametrize("policy", PERSISTENT)
def test_round_trip(policy: str, tmp_path: Path) -> None:
    maps = make_maps(policy)
    write_maps(maps, tmp_path / "new" / "m")
    read = read_maps(tmp_path / "new" / "m")
    assert read.summary() == maps.summary()
    assert set(read.arrays) == set(maps.arrays)
    for name, array in maps.arrays.items():
        np.testing.assert_array_equal(read.arrays[name], array)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m"]


@pytest.mark.parametrize("policy", PERSISTENT)
def test_a_policy_scores_the_same_after_loading_from_a_file(policy: str, tmp_path: Path) -> None:
    first, second = (make_policy(policy, SHAPE.layers, SHAPE.experts, capacity=20) for _ in range(2))
    first.load_state_dict(make_maps(policy, capacity=20).arrays)
    write_maps(make_maps(policy, capacity=20), tmp_path / "m")
    second.load_state_dict(read_maps(tmp_path / "m").arrays)
    for iteration in workload(7, SHAPE):
        for each in (first, second):
            each.begin(iteration.steps)
        for event in iteration.events:
            for each in (first, second):
                each.routed(event)
            np.testing.assert_array_equal(first.retention_priority, second.retention_priority)
        for each in (first, second):
            each.end()


@pytest.mark.parametrize("policy", PERSISTENT)
@pytest.mark.parametrize("position", [0, 5, 60, 400, -1000, -1, None])
def test_a_damaged_file_is_refused_and_named(tmp_path: Path, policy: str, position: int | None) -> None:
    path = make_file(tmp_path / "m", policy)
    content = bytearray(path.read_bytes())
    if position is None:
        del content[-100:]
    else:
        content[position] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(MapsError, match=rf"^{path}: "):
        read_maps(path)


def test_a_truncated_file_is_damaged_and_other_files_are_not_maps(tmp_path: Path) -> None:
    path = make_file(tmp_path / "m")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedMapsError, match="damaged"):
        read_maps(path)
    path.write_text("my diary")
    with pytest.raises(MapsError, match="not a file of expert maps") as caught:
        read_maps(path)
    assert not isinstance(caught.value, DamagedMapsError)
    save_file({"x": np.zeros(3)}, tmp_path / "x")
    with pytest.raises(MapsError, match="not a file of expert maps"):
        read_maps(tmp_path / "x")
    with pytest.raises(MapsError, match="no such file"):
        read_maps(tmp_path / "nothing")


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = make_file(tmp_path / "m")
    with safe_open(path, framework="numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert json.loads(metadata["header"])["maps"] == len(read_maps(path))
    save_file(arrays, path, metadata | {"version": "2"})
    with pytest.raises(MapsError, match="version 2, this finemoe reads 1"):
        read_maps(path)


INVALID: list[tuple[str, str, Any]] = [
    ("finemoe", "ids", 7), ("finemoe", "before", 9), ("finemoe", "before", -2), ("finemoe", "usual", np.nan),
    ("finemoe", "usual", -1), ("finemoe", "number", 0), ("finemoe", "active", 9), ("finemoe", "lookahead", np.nan),
    ("expert-map", "maps", np.inf), ("expert-map", "maps", -1), ("expert-map", "born", 1), ("expert-map", "active", 9),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "name", "value"), INVALID)
def test_invalid_values_are_refused(tmp_path: Path, policy: str, name: str, value: Any) -> None:
    maps = make_maps(policy)
    maps.arrays[name][:3] = value
    write_maps(maps, tmp_path / "m")
    with pytest.raises(DamagedMapsError, match="m: the expert maps are damaged"):
        read_maps(tmp_path / "m")


@pytest.mark.parametrize("policy", PERSISTENT)
def test_arrays_of_another_shape_dtype_or_name_are_refused(policy: str) -> None:
    maps = make_maps(policy)
    assert check_arrays(maps.arrays, maps.layers, maps.experts) is None
    assert check_arrays(maps.arrays, maps.layers + 1, maps.experts) is not None
    for name, array in maps.arrays.items():
        for other in (array[..., None], array.astype(np.float16), array[:0], array.ravel()[0] * np.ones(())):
            assert check_arrays(maps.arrays | {name: other}, maps.layers, maps.experts) is not None, name
        if name != "keys":
            without = {other: kept for other, kept in maps.arrays.items() if other != name}
            assert check_arrays(without, maps.layers, maps.experts) is not None, name
    assert check_arrays(maps.arrays | {"extra": np.zeros(1)}, maps.layers, maps.experts) == "extra is unknown"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_file(tmp_path / "m")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("finemoe.system.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        make_file(path, seeds=(5,))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


def test_summary() -> None:
    maps: Maps = make_maps()
    assert maps.summary() == {
        "policy": "finemoe", "model": "a-model", "fingerprint": "0123", "maps": 10, "layers": 3, "experts": 6,
        "active": 2, "stretches": 2, "embedding_width": 0, "memory_bytes": 10 * (3 * (6 + 2) + 12),
    }  # fmt: skip
    summary = make_maps("expert-map").summary()
    assert (summary["maps"], summary["stretches"], summary["embedding_width"]) == (12, None, SHAPE.width)


@pytest.mark.parametrize(("policy", "map_bytes"), [("finemoe", 2 * 3 * 2 + 8), ("expert-map", 4 * (3 * 6 + 5) + 16)])
def test_bytes_per_map_are_as_documented(policy: str, map_bytes: int) -> None:
    maps = make_maps(policy)
    total = sum(array.nbytes for name, array in maps.arrays.items() if name in ROW_ARRAYS)
    assert total == map_bytes * len(maps)
