"""Reading and writing `Maps` as one safetensors file, written atomically and validated. Format: docs/maps.md."""

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

_FORMAT = "finemoe maps"
_VERSION = 1
_SNIFFED_BYTES = 1 << 16


def write_maps(maps: Maps, path: Path) -> None:
    """Writes the maps atomically: a reader sees either the previous file or the new one.

    Raises:
        OSError: it can't be written; a previous file is left as it was.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in maps.arrays.items()}
    header = {
        "policy": maps.policy, "model": maps.model, "name": maps.name, "layers": maps.layers, "experts": maps.experts,
        "active": maps.active, "maps": len(maps),
    }  # fmt: skip
    header_json = json.dumps(header, sort_keys=True)
    digest = _digest(header_json, arrays)
    metadata = {"format": _FORMAT, "version": str(_VERSION), "header": header_json, "sha256": digest}
    replace_file(path, to_bytes(arrays, metadata))


def read_maps(path: Path) -> Maps:
    """Reads and checks what `write_maps` wrote.

    Raises:
        DamagedMapsError: it is a file of maps, but corrupt.
        MapsError: it is missing, can't be read, has another version, or is not a file of maps.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            _check_format(path, metadata)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise MapsError(f"{path}: there is no such file of expert maps") from error
    except OSError as error:
        raise MapsError(f"{path}: can't be read ({error.strerror or error})") from error
    except SafetensorError as error:
        if _looks_like_maps(path):
            raise DamagedMapsError(f"{path}: the expert maps are damaged ({error})") from error
        raise MapsError(f"{path}: not a file of expert maps; give one that finemoe wrote, or another name") from error
    header_json = metadata.get("header", "")
    if metadata.get("sha256") != _digest(header_json, arrays):
        raise DamagedMapsError(f"{path}: the expert maps are damaged (wrong checksum)")
    return _parse(path, header_json, arrays)


# Arrays of each kind: dtype and shape in letters: n maps, W weights of gate lookahead, R prompts, others as in `types`
_LINKED_ARRAYS = {
    "weights": ("uint8", "nLK"), "tokens": ("int32", "n"), "before": ("int32", "n"), "usual": ("float64", "LE"),
    "iterations": ("float64", "L"), "number": ("int64", "1"), "active": ("int64", "1"), "lookahead": ("float64", "W"),
}  # fmt: skip
_UNLINKED_ARRAYS = {
    "maps": ("float32", "nLE"), "tokens": ("int64", "n"), "born": ("int64", "n"), "p": ("float64", "LE"),
    "visits": ("float64", "LE"), "active": ("int64", "1"),
}  # fmt: skip
_PROMPT_ARRAYS = {"openings": ("float32", "RD"), "opened": ("float32", "RLE")}
_SIGNED = {"tokens", "keys", "before", "lookahead", "openings"}  # arrays that may have negative values


def check_arrays(arrays: Arrays, layers: int, experts: int) -> str | None:
    """Validates the arrays of a policy's `state_dict`: names, dtypes, shapes and values.

    Args:
        arrays: by name.
        layers: `L`.
        experts: the largest `E` of any layer.

    Returns:
        The first fault, for a message; `None` if the arrays are valid.
    """
    has_links = "before" in arrays
    expected = dict(_LINKED_ARRAYS if has_links else _UNLINKED_ARRAYS)
    sizes = {"L": layers, "E": experts, "1": 1, "n": int(np.size(arrays.get("tokens", ())))}
    sizes["W"] = max(3, int(np.size(arrays.get("lookahead", ()))) // 3 * 3)  # three per distance
    if has_links:
        expected["ids"] = ("uint8" if experts <= np.iinfo(np.uint8).max else "uint16", "nLK")
        sizes["K"] = arrays["ids"].shape[-1] if "ids" in arrays and arrays["ids"].ndim else 0
        if "openings" in arrays or "opened" in arrays:
            expected |= _PROMPT_ARRAYS
            sizes["R"], sizes["D"] = (*arrays["openings"].shape, 0, 0)[:2] if "openings" in arrays else (0, 0)
    elif "keys" in arrays:
        expected["keys"] = ("float32", "nD")
        sizes["D"] = arrays["keys"].shape[-1] if arrays["keys"].ndim else 0
    if differing := sorted(set(arrays) ^ set(expected)):
        return f"{differing[0]} is {'missing' if differing[0] in expected else 'unknown'}"
    for name, (dtype, letters) in expected.items():
        shape = tuple(sizes[letter] for letter in letters)
        if arrays[name].dtype != dtype or arrays[name].shape != shape:
            return f"{name} is {arrays[name].dtype} {list(arrays[name].shape)} and should be {dtype} {list(shape)}"
    for name, array in arrays.items():
        if not np.isfinite(array).all() or (name not in _SIGNED and (array < 0).any()):
            return f"{name} has negative or non-finite values"
    if not sizes["n"]:
        return "it has no maps"
    return _check_linked(arrays, experts) if has_links else _check_unlinked(arrays, experts)


def _check_linked(arrays: Arrays, experts: int) -> str | None:
    before, n = arrays["before"], len(arrays["before"])
    if not 1 <= arrays["ids"].shape[2] <= experts or (arrays["ids"] > experts).any():
        return f"ids has experts above {experts}"
    if (before < NO_ROW).any() or (before >= np.arange(n)).any():
        return "before links to a row that is not older"
    if np.bincount(before[before != NO_ROW], minlength=1).max() > 1:
        return "before links to one row twice"
    if arrays["number"][0] < n or arrays["active"][0] > experts:
        return "number or active is inconsistent with the arrays"
    return None


def _check_unlinked(arrays: Arrays, experts: int) -> str | None:
    if (arrays["born"] < 1).any() or len(np.unique(arrays["born"])) < len(arrays["born"]):
        return "born has numbers below 1 or duplicates"
    if arrays["active"][0] > experts:
        return f"active is above {experts}"
    return None


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise MapsError(f"{path}: not a file of expert maps; give one that finemoe wrote, or another name")
    if metadata.get("version") != str(_VERSION):
        raise MapsError(
            f"{path}: expert maps of version {metadata.get('version')}, this finemoe reads {_VERSION}; update it, or "
            "give another name"
        )


def _parse(path: Path, header_json: str, arrays: StateDict) -> Maps:
    try:
        header: dict[str, Any] = json.loads(header_json)
        maps = Maps(
            policy=str(header["policy"]), model=str(header["model"]), name=str(header["name"]),
            layers=int(header["layers"]), experts=int(header["experts"]), arrays=arrays,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedMapsError(f"{path}: the expert maps are damaged (the header can't be read)") from error
    fault = check_arrays(arrays, maps.layers, maps.experts)
    if fault is None and (header.get("active"), header.get("maps")) != (maps.active, len(maps)):
        fault = "header and arrays contradict each other"
    if fault is not None:
        raise DamagedMapsError(f"{path}: the expert maps are damaged ({fault})")
    return maps


def _looks_like_maps(path: Path) -> bool:
    """Whether an unreadable file was written by `write_maps`; only then may it be treated as damaged and moved."""
    try:
        with path.open("rb") as file:
            return _FORMAT.encode() in file.read(_SNIFFED_BYTES)
    except OSError:
        return False


def _digest(header_json: str, arrays: StateDict) -> str:
    digest = hashlib.sha256(header_json.encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
