"""Headers of a GGUF file or split set: metadata, and the location of every tensor and expert.

Reads headers only: a few MiB for a file of any size. The format: magic `GGUF`, version, number of tensors, number of
key-value pairs, the pairs, then name, shape, type and offset of every tensor. The aligned tensor data follow.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from finemoe.errors import CheckpointError, UnsupportedModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_KEPT_ELEMENTS = 4096  # longer arrays, such as vocabularies, are skipped; only the length is kept
_MOST = 1 << 24  # upper limit of the counts in a header
_LONGEST_NAME = 63  # llama.cpp's limit for tensor names
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(?:gate_up|gate|up|down)_((?:ch)?exps)\.weight")


OpenPart = Callable[[Path], tuple[BinaryIO, int]]


class TensorInfo(NamedTuple):
    """A tensor's header entry. `shape` is innermost first; `offset_bytes` is relative to the start of its file."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: int
    offset_bytes: int
    size_bytes: int


class Array(NamedTuple):
    """A long metadata array, of which only the length is kept."""

    length: int


@dataclass(frozen=True)
class ExpertTensor:
    """The weights of one projection for all experts of a layer, stored expert after expert."""

    info: TensorInfo
    block: int  # index among all blocks of the model, dense ones included
    kind: str  # `exps`, or `chexps` for a second, smaller set of experts in the block

    @property
    def experts(self) -> int:
        """Number of experts, `E`."""
        return self.info.shape[2]

    @property
    def expert_bytes(self) -> int:
        """Size of one expert's weights in this tensor."""
        return self.info.size_bytes // self.experts

    def offset_bytes(self, expert: int) -> int:
        """Offset of an expert's weights in the file."""
        return self.info.offset_bytes + expert * self.expert_bytes


@dataclass(frozen=True)
class GgufFile:
    """The headers of one model.

    Attributes:
        files: the parts in order, usually one.
        metadata: key-value pairs of the first part; short arrays are lists.
        tensors: entries of all parts, by name.
        stamps: device, inode, size and mtime of each file, to detect a change; empty for remote files.
    """

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    stamps: tuple[tuple[int, ...], ...] = ()

    def refuse_changed(self) -> None:
        """Raises `CheckpointError` if a file was replaced or changed after its header was read."""
        for path, stamp in zip(self.files, self.stamps, strict=True):
            if _stamp(path) != stamp:
                raise CheckpointError(f"{path}: has changed while it was loaded; load it again")

    @property
    def name(self) -> str:
        """The first part's path, for error messages."""
        return str(self.files[0])

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value of the architecture: `expert_count` reads `<architecture>.expert_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @cached_property
    def expert_tensors(self) -> tuple[ExpertTensor, ...]:
        """Expert tensors by block and kind, then in file order."""
        found = []
        for info in self.tensors.values():
            named = _EXPERTS.fullmatch(info.name)
            if named and len(info.shape) == 3 and info.shape[2] > 1 and not info.size_bytes % info.shape[2]:
                found.append(ExpertTensor(info, int(named[1]), named[2]))
        return tuple(sorted(found, key=lambda tensor: (tensor.block, tensor.kind)))

    @property
    def expert_bytes(self) -> int:
        """Total size of all routed experts."""
        return sum(tensor.info.size_bytes for tensor in self.expert_tensors)

    @property
    def dense_bytes(self) -> int:
        """Total size of all other tensors."""
        return sum(info.size_bytes for info in self.tensors.values()) - self.expert_bytes

    @property
    def active_experts(self) -> int:
        """The largest number of experts per token, `K`; 1 if the file does not state it."""
        used = self.value("expert_used_count", 1)
        return max((int(count) for count in (used if isinstance(used, list) else [used])), default=1)

    @property
    def context_tokens(self) -> int | None:
        """The context length that the model was trained for; `None` if the file does not state it."""
        length = self.value("context_length")
        return int(length) if isinstance(length, int) else None

    def refuse_dense(self) -> None:
        """Raises `UnsupportedModelError` if the model has no routed experts."""
        if not self.expert_tensors:
            raise UnsupportedModelError(
                f"{self.name}: is a dense model ({self.architecture}), without routed experts; run it with llama.cpp"
            )


def open_local(path: Path) -> tuple[BinaryIO, int]:
    """Open a local file. Returns it and its size in bytes."""
    return path.open("rb", buffering=1 << 20), path.stat().st_size


def open_gguf(path: str | Path, open_part: OpenPart = open_local) -> GgufFile:
    """Read the headers of a single file, or of a split set given by its first part.

    Args:
        path: the file or first part.
        open_part: opens a part and returns it with its size in bytes; only its header is read.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt or not a GGUF file; the message names it.
    """
    first = Path(path)
    metadata, tensors = _read_part(first, 0, open_part)
    files = [first]
    for number in range(1, _part_count(first, metadata)):
        named = _PART.fullmatch(first.name)
        assert named is not None
        part = first.with_name(f"{named[1]}-{number + 1:05}-of-{named[3]}.gguf")
        own, more = _read_part(part, number, open_part)
        if own.get("split.no") != number:
            raise CheckpointError(
                f"{part}: its header has part number {own.get('split.no')} instead of {number}; fetch it again"
            )
        if duplicates := tensors.keys() & more.keys():
            raise CheckpointError(f"{part}: repeats {min(duplicates)} of an earlier part; fetch all parts again")
        files.append(part)
        tensors |= more
    total = metadata.get("split.tensors.count")
    if len(files) > 1 and total is not None and total != len(tensors):
        raise CheckpointError(f"{first}: its parts contain {len(tensors)} of {total} tensors; fetch all parts again")
    if not metadata.get("general.architecture"):
        raise CheckpointError(f"{first}: names no architecture (general.architecture); fetch it again")
    stamps = tuple(map(_stamp, files)) if open_part is open_local else ()
    return GgufFile(tuple(files), metadata, tensors, stamps)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _part_count(first: Path, metadata: Mapping[str, Any]) -> int:
    """Number of parts of the split set that starts with this file; 1 for a single file."""
    count = metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return 1
    named = _PART.fullmatch(first.name)
    if named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{first}: is one of {count} parts, but is not named as one; rename it to <name>-00001-of-{count:05}.gguf"
        )
    if metadata.get("split.no") != 0:
        raise CheckpointError(f"{first}: is not the first part; give {named[1]}-00001-of-{named[3]}.gguf")
    return count


def _read_part(path: Path, file: int, open_part: OpenPart) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    try:
        stream, size_bytes = open_part(path)
        with stream:
            return _Reader(stream, size_bytes, str(path)).header(file)
    except FileNotFoundError:
        way_out = "it is a part of the model: fetch all parts into one folder" if file else "give a .gguf file"
        raise CheckpointError(f"{path}: does not exist; {way_out}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error


class _Reader:
    """Reads one header sequentially."""

    def __init__(self, stream: BinaryIO, size_bytes: int, name: str) -> None:
        self._stream = stream
        self._size_bytes = size_bytes
        self._name = name

    def header(self, file: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """The metadata, and the tensors by name."""
        if self._take(4) != _MAGIC:
            raise CheckpointError(f"{self._name}: is not a GGUF file; give a .gguf file or a checkpoint folder")
        version = self._number("I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self._name}: has GGUF version {version}; supported versions: {_VERSIONS}")
        tensors, pairs = self._count("tensors"), self._count("pairs")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        entries = [self._entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._corrupt(f"an alignment of {alignment}")
        start_bytes = -(-self._stream.tell() // alignment) * alignment
        infos = {}
        for name, shape, type_number, offset_bytes in entries:
            kind, size_bytes = self._size(name, shape, type_number)
            if offset_bytes % alignment or name in infos:
                raise self._corrupt(f"a wrong entry for {name}")
            infos[name] = TensorInfo(name, kind, shape, file, start_bytes + offset_bytes, size_bytes)
            if start_bytes + offset_bytes + size_bytes > self._size_bytes:
                raise CheckpointError(
                    f"{self._name}: is truncated: {name} ends at byte {start_bytes + offset_bytes + size_bytes} of a "
                    f"file of {self._size_bytes}; fetch it again"
                )
        self._refuse_overlap(infos)
        return metadata, infos

    def _refuse_overlap(self, infos: Mapping[str, TensorInfo]) -> None:
        end_bytes = 0
        for info in sorted(infos.values(), key=lambda info: info.offset_bytes):
            if info.offset_bytes < end_bytes:
                raise self._corrupt(f"{info.name} overlapping another tensor")
            end_bytes = info.offset_bytes + info.size_bytes

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
            raise self._corrupt("a tensor with an invalid name")
        dimensions = self._number("I")
        if not 1 <= dimensions <= 4:
            raise self._corrupt(f"{name} with {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape, self._number("I"), self._number("Q")

    def _size(self, name: str, shape: tuple[int, ...], type_number: int) -> tuple[str, int]:
        """The type's name, and the tensor's size in bytes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(type_number)
        except ValueError:
            raise CheckpointError(
                f"{self._name}: {name} has type {type_number}, which is unknown; use a file with another type"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        elements = 1
        for length in shape:
            elements *= length
        if not 0 < elements < 1 << 50 or shape[0] % block:
            raise self._corrupt(f"{name} of shape {list(shape)} in {kind.name}")
        return kind.name, elements // block * block_bytes

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, length = self._number("I"), self._number("Q")
            if inner == _ARRAY:
                raise self._corrupt("an array of arrays")
            return self._array(inner, length)
        if kind not in _SCALARS:
            raise self._corrupt(f"a value of type {kind}")
        return self._number(_SCALARS[kind])

    def _array(self, kind: int, length: int) -> Any:
        self._refuse_beyond(length)
        if kind == _STRING:
            values = []
            for _ in range(length):
                text = self._string()
                if length <= _KEPT_ELEMENTS:
                    values.append(text)
            return values if length <= _KEPT_ELEMENTS else Array(length)
        if kind not in _SCALARS:
            raise self._corrupt(f"an array of type {kind}")
        each_bytes = struct.calcsize("<" + _SCALARS[kind])
        self._refuse_beyond(length * each_bytes)
        if length > _KEPT_ELEMENTS:
            self._stream.seek(length * each_bytes, os.SEEK_CUR)
            return Array(length)
        return list(struct.unpack(f"<{length}{_SCALARS[kind]}", self._take(length * each_bytes)))

    def _string(self) -> str:
        return self._take(self._number("Q")).decode(errors="replace")

    def _count(self, what: str) -> int:
        count: int = self._number("Q")
        if count > _MOST:
            raise self._corrupt(f"{count} {what}")
        return count

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def _take(self, length: int) -> bytes:
        self._refuse_beyond(length)
        data = self._stream.read(length)
        if len(data) < length:
            raise self._truncated()
        return data

    def _refuse_beyond(self, length: int) -> None:
        if length > self._size_bytes - self._stream.tell():
            raise self._truncated()

    def _truncated(self) -> CheckpointError:
        return CheckpointError(f"{self._name}: is truncated or corrupt within its header; fetch it again")

    def _corrupt(self, found: str) -> CheckpointError:
        return CheckpointError(f"{self._name}: is corrupt: its header has {found}; fetch it again")
