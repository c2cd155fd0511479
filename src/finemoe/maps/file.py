"""The file: one safetensors file, there in full or not at all. See docs/maps.md."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from finemoe.errors import DamagedMapsError, MapsError
from finemoe.folders import replace_file
from finemoe.maps.check import fault
from finemoe.maps.maps import Maps
from finemoe.policy.base import Knowledge

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


def _checked(path: Path, about: str, arrays: Knowledge) -> Maps:
    try:
        header: dict[str, Any] = json.loads(about)
        maps = Maps(
            policy=str(header["policy"]), model=str(header["model"]), name=str(header["name"]),
            layers=int(header["layers"]), experts=int(header["experts"]), arrays=arrays,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedMapsError(f"{path}: the expert maps are damaged (their header can't be read)") from error
    wrong = fault(arrays, maps.layers, maps.experts)
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


def _digest(about: str, arrays: Knowledge) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
