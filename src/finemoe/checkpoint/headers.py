"""Safetensors headers, validated before anything is loaded, and fingerprints of checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from finemoe.errors import CheckpointError

_HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
_FINGERPRINT_DIGITS = 16
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}  # left out of fingerprints
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4,
}  # fmt: skip


class TensorHeader(NamedTuple):
    """Where one tensor's bytes are. `dtype` is the format's name for it (`BF16`)."""

    file: int  # index into the checkpoint's files
    offset_bytes: int  # from the start of the file
    length_bytes: int
    dtype: str
    shape: tuple[int, ...]


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Headers of all tensors in `files`, by name.

    Raises:
        CheckpointError: a file is missing, truncated or not a safetensors file, or two files hold the same tensor.
    """
    tensors: dict[str, TensorHeader] = {}
    for index, path in enumerate(files):
        for name, header in _read_file(index, path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name} is also in another shard of this checkpoint")
            tensors[name] = header
    return tensors


def _read_file(index: int, path: Path) -> dict[str, TensorHeader]:
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 0 < length_bytes <= min(_HEADER_LIMIT_BYTES, size_bytes - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut off in its header; fetch it again")
            raw = file.read(length_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror or error})") from error
    try:
        table: dict[str, Any] = json.loads(raw)
        parsed = {
            name: parse_entry(index, 8 + length_bytes, entry) for name, entry in table.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is corrupt ({error}); fetch it again") from error
    end_bytes = max((t.offset_bytes + t.length_bytes for t in parsed.values()), default=0)
    if end_bytes > size_bytes:
        raise CheckpointError(
            f"{path}: truncated: the header promises {end_bytes} bytes, the file has {size_bytes}; fetch it again"
        )
    return parsed


def parse_entry(file: int, data_offset_bytes: int, entry: dict[str, Any]) -> TensorHeader:
    """Parse one entry of a header's JSON.

    Raises:
        ValueError, KeyError, TypeError: the entry is malformed.
    """
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = entry["dtype"]
    if dtype not in _ITEM_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"offsets {begin}, {end} and shape {list(shape)} are not all non-negative integers")
    if end - begin != prod(shape) * _ITEM_BITS[dtype] // 8:
        raise ValueError(f"{end - begin} bytes for shape {list(shape)} of {dtype}")
    return TensorHeader(file, data_offset_bytes + begin, end - begin, dtype, shape)


def fingerprint(folder: Path, headers: Mapping[str, TensorHeader]) -> str:
    """A model's fingerprint, 16 hexadecimal digits: a hash of its config and of its tensors' names, dtypes and shapes.

    Does not depend on how the tensors are split into files, nor on the weights.

    Raises:
        CheckpointError: config.json can't be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: can't be read ({error})") from error
    stable = {key: value for key, value in config.items() if key not in _VOLATILE}
    tensors = sorted((name, header.dtype, header.shape) for name, header in headers.items())
    return hashlib.sha256(json.dumps([stable, tensors], sort_keys=True).encode()).hexdigest()[:_FINGERPRINT_DIGITS]


def files_fingerprint(files: Iterable[Path]) -> str:
    """A fingerprint of these very files, 16 hexadecimal digits: a hash of their paths, sizes and times.

    Files that were moved or written again have another one. No file is read.
    """
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:_FINGERPRINT_DIGITS]
