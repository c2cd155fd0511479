"""A short, stable name for a checkpoint's content, from its config and headers: no weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from finemoe.checkpoint.headers import TensorHeader
from finemoe.errors import CheckpointError

_DIGITS = 16
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}


def fingerprint(folder: Path, headers: Mapping[str, TensorHeader]) -> str:
    """16 hexadecimal digits. The same for every way of splitting the same tensors into files.

    Raises:
        CheckpointError: config.json can't be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: can't be read ({error})") from error
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE}
    tensors = sorted((name, header.dtype, header.shape) for name, header in headers.items())
    return hashlib.sha256(json.dumps([lasting, tensors], sort_keys=True).encode()).hexdigest()[:_DIGITS]


def files_fingerprint(files: Iterable[Path]) -> str:
    """16 hexadecimal digits for what is in these very files, by their place, size and time: none is read.

    Files that were moved, or written anew, have another one.
    """
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:_DIGITS]
