"""The file: one safetensors file, there in full or not at all. See docs/maps.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from finemoe.errors import DamagedMapsError, MapsError
from finemoe.learned.maps import Maps
from finemoe.policy.base import StateDict
from finemoe.policy.finemoe.history import NO_ROW
from finemoe.system import replace_file

Arrays = Mapping[str, npt.NDArray[Any]]
# dtype and shape; letters are sizes, n the number of maps
_OF_ROWS = {
    "weights": ("uint8", "nLK"), "tokens": ("int32", "n"), "before": ("int32", "n"), "usual": ("float64", "LE"),
    "iterations": ("float64", "L"), "number": ("int64", "1"), "active": ("int64", "1"), "lookahead": ("float64", "W"),
}  # fmt: skip
_OF_MAPS = {
    "maps": ("float32", "nLE"), "tokens": ("int64", "n"), "born": ("int64", "n"), "p": ("float64", "LE"),
    "visits": ("float64", "LE"), "active": ("int64", "1"),
}  # fmt: skip
_OF_OPENINGS = {"openings": ("float32", "RD"), "opened": ("float32", "RLE")}
_SIGNED = {"tokens", "keys", "before", "lookahead", "openings"}


def check_arrays(arrays: Arrays, layers: int, experts: int) -> str | None:
    """What is wrong with the arrays of a policy; `None` if nothing is."""
    has_links = "before" in arrays
    expected = dict(_OF_ROWS if has_links else _OF_MAPS)
    sizes = {"L": layers, "E": experts, "1": 1, "n": int(np.size(arrays.get("tokens", ())))}
    sizes["W"] = max(3, int(np.size(arrays.get("lookahead", ()))) // 3 * 3)  # three weights for each distance
    if has_links:
        expected["ids"] = ("uint8" if experts <= np.iinfo(np.uint8).max else "uint16", "nLK")
        sizes["K"] = arrays["ids"].shape[-1] if "ids" in arrays and arrays["ids"].ndim else 0
        if "openings" in arrays or "opened" in arrays:
            expected |= _OF_OPENINGS
            sizes["R"], sizes["D"] = (*arrays["openings"].shape, 0, 0)[:2] if "openings" in arrays else (0, 0)
    elif "keys" in arrays:
        expected["keys"] = ("float32", "nD")
        sizes["D"] = arrays["keys"].shape[-1] if arrays["keys"].ndim else 0
    if odd := sorted(set(arrays) ^ set(expected)):
        return f"{odd[0]} is {'missing' if odd[0] in expected else 'unknown'}"
    for name, (dtype, letters) in expected.items():
        shape = tuple(sizes[letter] for letter in letters)
        if arrays[name].dtype != dtype or arrays[name].shape != shape:
            return f"{name} is {arrays[name].dtype} {list(arrays[name].shape)} and should be {dtype} {list(shape)}"
    for name, array in arrays.items():
        if not np.isfinite(array).all() or (name not in _SIGNED and (array < 0).any()):
            return f"{name} has values that are no share or count"
    if not sizes["n"]:
        return "there is no map in it"
    return _of_rows(arrays, experts) if has_links else _of_maps(arrays, experts)


def _of_rows(arrays: Arrays, experts: int) -> str | None:
    before, n = arrays["before"], len(arrays["before"])
    if not 1 <= arrays["ids"].shape[2] <= experts or (arrays["ids"] > experts).any():
        return f"ids has experts beyond {experts}"
    if (before < NO_ROW).any() or (before >= np.arange(n)).any():
        return "before has a link to a row that is not older"
    if np.bincount(before[before != NO_ROW], minlength=1).max() > 1:
        return "before has two links to one row"
    if arrays["number"][0] < n or arrays["active"][0] > experts:
        return "its counts contradict each other"
    return None


def _of_maps(arrays: Arrays, experts: int) -> str | None:
    if (arrays["born"] < 1).any() or len(np.unique(arrays["born"])) < len(arrays["born"]):
        return "born has numbers that are no order"
    if arrays["active"][0] > experts:
        return f"active is beyond {experts}"
    return None


_FORMAT = "finemoe maps"
_VERSION = 1
_SNIFFED_BYTES = 1 << 16


def write_maps(maps: Maps, path: Path) -> None:
    """Writes the maps; a reader sees the older file or this one, never a part.

    Raises:
        OSError: it can't be written; an older file is left as it was.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in maps.arrays.items()}
    header = {
        "policy": maps.policy, "model": maps.model, "name": maps.name, "layers": maps.layers, "experts": maps.experts,
        "active": maps.active, "maps": len(maps),
    }  # fmt: skip
    about = json.dumps(header, sort_keys=True)
    content = to_bytes(
        arrays, {"format": _FORMAT, "version": str(_VERSION), "header": about, "sha256": _digest(about, arrays)}
    )
    replace_file(path, content)


def read_maps(path: Path) -> Maps:
    """Reads and checks what `write_maps` wrote.

    Raises:
        DamagedMapsError: the file was a file of maps, and is not whole any more.
        MapsError: it is missing, can't be read, is of a newer version, or never was a file of maps.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            _refuse_others(path, metadata)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise MapsError(f"{path}: there is no such file of expert maps") from error
    except OSError as error:
        raise MapsError(f"{path}: can't be read ({error.strerror or error})") from error
    except SafetensorError as error:
        if _was_ours(path):
            raise DamagedMapsError(f"{path}: the expert maps are damaged ({error})") from error
        raise MapsError(f"{path}: not a file of expert maps; give one that finemoe wrote, or another name") from error
    about = metadata.get("header", "")
    if metadata.get("sha256") != _digest(about, arrays):
        raise DamagedMapsError(f"{path}: the expert maps are damaged (their checksum is another)")
    return _checked(path, about, arrays)


def _refuse_others(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise MapsError(f"{path}: not a file of expert maps; give one that finemoe wrote, or another name")
    if metadata.get("version") != str(_VERSION):
        raise MapsError(
            f"{path}: expert maps of version {metadata.get('version')}, this finemoe reads {_VERSION}; update it, or "
            "give another name"
        )


def _checked(path: Path, about: str, arrays: StateDict) -> Maps:
    try:
        header: dict[str, Any] = json.loads(about)
        maps = Maps(
            policy=str(header["policy"]), model=str(header["model"]), name=str(header["name"]),
            layers=int(header["layers"]), experts=int(header["experts"]), arrays=arrays,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedMapsError(f"{path}: the expert maps are damaged (their header can't be read)") from error
    wrong = check_arrays(arrays, maps.layers, maps.experts)
    if wrong is None and (header.get("active"), header.get("maps")) != (maps.active, len(maps)):
        wrong = "header and arrays disagree"
    if wrong is not None:
        raise DamagedMapsError(f"{path}: the expert maps are damaged ({wrong})")
    return maps


def _was_ours(path: Path) -> bool:
    """Whether a file that is no safetensors file any more once held maps: it may only be moved aside if it did."""
    try:
        with path.open("rb") as file:
            return _FORMAT.encode() in file.read(_SNIFFED_BYTES)
    except OSError:
        return False


def _digest(about: str, arrays: StateDict) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
