"""`--expert-dtype`: a quantized copy of a checkpoint's experts on disk, one file per layer.

A layer's file is a safetensors file with a single tensor `[E, bytes]`: each row is the content of one expert's slot. It
gets its name only when it is complete, so an interrupted conversion resumes at the layer where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from finemoe.budget import format_bytes
from finemoe.checkpoint import Checkpoint, ExpertIndex, Field, LayerLayout, QuantizedParameter, TensorHeader
from finemoe.checkpoint.expert_index import ALIGN_BYTES, PAGE_BYTES, PLACED_BYTES, round_up
from finemoe.checkpoint.headers import files_fingerprint, fingerprint
from finemoe.errors import CheckpointError, ConfigError
from finemoe.store import DiskStore
from finemoe.store.direct_io import CHUNK_BYTES
from finemoe.store.quantization import SCHEMES, Scheme, require_torchao
from finemoe.system import evict_from_page_cache, user_experts
from finemoe.types import ByteRange, ExpertId

_VERSION = 1
_TENSOR = "experts"


def copy_folder(checkpoint: Checkpoint, headers: Mapping[str, TensorHeader], scheme: Scheme) -> Path:
    """Folder of the copy of this checkpoint's experts, in the user's cache."""
    model, files = fingerprint(checkpoint.folder, headers), files_fingerprint(checkpoint.files)
    return user_experts() / f"{model}-{files}-{scheme.name}"


def planned_copy(
    checkpoint: Checkpoint, headers: Mapping[str, TensorHeader], expert_index: ExpertIndex, expert_dtype: str
) -> ExpertCopy | None:
    """The copy for a value of `--expert-dtype`; `None` if it needs none. Nothing is written yet."""
    scheme = SCHEMES.get(expert_dtype)
    return None if scheme is None else ExpertCopy(expert_index, scheme, copy_folder(checkpoint, headers, scheme))


class ExpertCopy:
    """A copy and its expert index. Nothing is read or written before `write`.

    Args:
        source: the checkpoint's expert index.
        scheme: of the quantization.
        folder: of the copy's files; need not exist.

    Raises:
        ConfigError: the checkpoint's experts are quantized already, or can't be quantized.
    """

    def __init__(self, source: ExpertIndex, scheme: Scheme, folder: Path) -> None:
        stored = [layout.stored_dtype for layout in source.layouts if layout.quantized]
        if stored:
            raise ConfigError(
                f"--expert-dtype: this checkpoint's experts are stored as {stored[0]} already; leave it out"
            )
        self._source = source
        self._scheme = scheme
        self._folder = folder
        self._headers: list[bytes] = []
        layouts = []
        byte_ranges: dict[ExpertId, tuple[ByteRange, ...]] = {}
        for layer, layout in enumerate(source.layouts):
            planned = _plan(layout, scheme)
            header = _header(planned, scheme)
            for expert in range(layout.experts):
                start = len(header) + expert * _record_bytes(planned)
                byte_ranges[ExpertId(layer, expert)] = (ByteRange(layer, start, planned.length_bytes, 0),)
            layouts.append(planned)
            self._headers.append(header)
        if not any(layout.quantized for layout in layouts):
            raise ConfigError("--expert-dtype: this model's experts are too narrow to be quantized; leave it out")
        self.expert_index = ExpertIndex(layouts, byte_ranges)
        self.files = tuple(folder / f"layer-{layer:05d}.safetensors" for layer in range(len(layouts)))

    def write(self, store: DiskStore, *, progress: bool | None = None) -> None:
        """Write the layers that are missing. Waits for another process that writes the same copy.

        Args:
            store: reads the checkpoint's experts.
            progress: show a bar on standard error; by default only on a terminal.

        Raises:
            ConfigError: the folder can't be written to, or the disk has too little space.
            OSError: reading failed.
        """
        if not self._missing():
            return
        require_torchao()
        from tqdm import tqdm

        with self._write_lock():
            missing = self._missing()
            self._require_disk(missing)
            total = sum(self.expert_index.layouts[layer].experts for layer in missing)
            title = f"quantizing experts to {self._scheme.name}, once"
            hidden = None if progress is None else not progress  # None: unless it is a terminal
            with tqdm(total=total, unit=" experts", desc=title, disable=hidden) as bar:
                for layer in missing:
                    self._write_layer(layer, store, bar)

    @contextmanager
    def _write_lock(self) -> Iterator[None]:
        """Creates the folder and holds its lock, between processes."""
        lock = FileLock(self._folder / ".lock")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise ConfigError(
                f"--expert-dtype: {self._folder}, where the copy of the experts belongs, can't be written to "
                f"({error.strerror or error}); point FINEMOE_CACHE elsewhere"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _missing(self) -> list[int]:
        """Layers without a complete file."""
        return [layer for layer, file in enumerate(self.files) if not self._is_complete(layer, file)]

    def _is_complete(self, layer: int, file: Path) -> bool:
        """Whether a layer's file exists, has this layout, and has its full size."""
        header = self._headers[layer]
        try:
            with file.open("rb") as opened:
                return opened.read(len(header)) == header and file.stat().st_size == self._file_bytes(layer)
        except OSError:
            return False

    def _file_bytes(self, layer: int) -> int:
        layout = self.expert_index.layouts[layer]
        return len(self._headers[layer]) + layout.experts * _record_bytes(layout)

    def _require_disk(self, missing: list[int]) -> None:
        needed, free = sum(map(self._file_bytes, missing)), shutil.disk_usage(self._folder).free
        if needed > free:
            raise ConfigError(
                f"--expert-dtype: the {self._scheme.name} copy of the experts takes {format_bytes(needed)} more in "
                f"{self._folder}, where {format_bytes(free)} are free; make room, or point FINEMOE_CACHE elsewhere"
            )

    def _write_layer(self, layer: int, store: DiskStore, bar: Any) -> None:
        file = self.files[layer]
        part = file.with_suffix(".part")
        try:
            with part.open("wb") as opened:
                opened.write(self._headers[layer])
                for record in self._records(layer, store):
                    opened.write(record.numpy().data)
                    bar.update()
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(file)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:  # from writing: errors of reading name their file
                raise ConfigError(f"--expert-dtype: {part} can't be written ({error.strerror})") from error
            raise
        evict_from_page_cache(file)  # it is read with direct I/O

    def _records(self, layer: int, store: DiskStore) -> Iterator[Tensor]:
        """The slot contents of the layer's experts, one after the other."""
        source, target = self._source.layouts[layer], self.expert_index.layouts[layer]
        raw = torch.empty(source.length_bytes, dtype=torch.uint8)
        places = {f.name: offset for f, offset in zip(target.fields, target.offsets_bytes[0], strict=True)}
        quantized = {each.name: each for each in target.quantized}
        for expert in range(source.experts):
            _read(store, ExpertId(layer, expert), raw)
            record = torch.zeros(_record_bytes(target), dtype=torch.uint8)
            for field, offset_bytes in zip(source.fields, source.offsets_bytes[expert], strict=True):
                stored = raw[offset_bytes : offset_bytes + field.length_bytes].clone().view(field.dtype)
                weights = field.restore(stored.view(field.stored_shape))
                if field.name not in quantized:
                    _place(record, places[field.name], weights)
                    continue
                if not bool(weights.isfinite().all()):
                    raise CheckpointError(
                        f"{source.module}: {field.name} of expert {expert} is not finite and can't be quantized"
                    )
                pieces = self._scheme.quantize(weights)
                for name, piece in zip(quantized[field.name].fields, pieces, strict=True):
                    _place(record, places[name], piece)
            yield record


def _plan(layout: LayerLayout, scheme: Scheme) -> LayerLayout:
    """The slot layout of the copy: quantized matrices in several fields, other parameters unchanged."""
    fields: list[Field] = []
    offsets_bytes: list[int] = []
    quantized: list[QuantizedParameter] = []
    end_bytes = 0

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        nonlocal end_bytes
        offsets_bytes.append(round_up(end_bytes, ALIGN_BYTES))
        length_bytes = torch.Size(shape).numel() * dtype.itemsize
        fields.append(Field(name, shape, shape, dtype, length_bytes))
        end_bytes = offsets_bytes[-1] + length_bytes

    for field in layout.fields:
        pieces = scheme.pieces(field.shape)
        if pieces is None:
            add(field.name, field.shape, field.dtype)
            continue
        for piece, (shape, dtype) in pieces.items():
            add(f"{field.name}.{piece}", shape, dtype)
        names = tuple(f"{field.name}.{piece}" for piece in pieces)
        dequantize = scheme.dequantize_as(field.shape)
        quantized.append(
            QuantizedParameter(field.name, field.shape, scheme.name, names, dequantize, parts=field.shape[0])
        )
    return LayerLayout(
        layout.module,
        layout.experts,
        tuple(fields),
        (tuple(offsets_bytes),) * layout.experts,
        end_bytes,
        tuple(quantized),
    )


def _header(layout: LayerLayout, scheme: Scheme) -> bytes:
    """Header of a layer's file, padded to whole pages, so that page-aligned experts are read directly into place."""
    about = {
        "version": _VERSION,
        "scheme": [scheme.name, scheme.bits, scheme.group],
        "module": layout.module,
        "fields": [
            [field.name, list(field.shape), str(field.dtype), offset_bytes]
            for field, offset_bytes in zip(layout.fields, layout.offsets_bytes[0], strict=True)
        ],
    }
    record = _record_bytes(layout)
    table = {
        "__metadata__": {"finemoe": json.dumps(about)},
        _TENSOR: {"dtype": "U8", "shape": [layout.experts, record], "data_offsets": [0, layout.experts * record]},
    }
    text = json.dumps(table).encode()
    text = text.ljust(round_up(8 + len(text), PAGE_BYTES) - 8)
    return len(text).to_bytes(8, "little") + text


def _record_bytes(layout: LayerLayout) -> int:
    large = layout.length_bytes >= PLACED_BYTES
    return round_up(layout.length_bytes, PAGE_BYTES if large else ALIGN_BYTES)


def _read(store: DiskStore, expert: ExpertId, into: Tensor) -> None:
    memory = into.numpy().data
    for byte_range in store.byte_ranges(expert):
        at = byte_range.slot_offset_bytes
        for start in range(0, byte_range.length_bytes, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, byte_range.length_bytes)
            store.read(byte_range, start, memory[at + start : at + end])


def _place(record: Tensor, offset_bytes: int, values: Tensor) -> None:
    raw = values.contiguous().reshape(-1).view(torch.uint8)
    record[offset_bytes : offset_bytes + len(raw)] = raw
