"""Resolves `--model` to a local GGUF file: a path, or a hub id with a quantisation or file name."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from finemoe.checkpoint.locate import hub_errors
from finemoe.errors import CheckpointError, ConfigError
from finemoe.gguf.file import GgufFile, open_gguf

_SUFFIX = ".gguf"
_HUB = re.compile(r"([^/:\s]+/[^/:\s]+):([^:\s]+)")
_FIRST_PART = re.compile(r"-00001-of-\d{5}\.gguf$")
_LATER_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_REMOTE_BLOCK_BYTES = 1 << 20
_PROJECTOR = "mmproj"  # image projector files, not language models


def is_gguf(model: str | None) -> bool:
    """Whether `--model` names a GGUF model: a `.gguf` file, or `org/name:quantisation`."""
    if model is None:
        return False
    if model.lower().endswith(_SUFFIX):
        return True
    return _HUB.fullmatch(model) is not None and not Path(model).exists()


def refuse_gguf(model: str | None, command: str) -> None:
    """Raises `ConfigError` if `model` is a GGUF model, which `command` does not support yet."""
    if is_gguf(model):
        raise ConfigError(f"--model: finemoe {command} does not run GGUF models yet ({model}); give a checkpoint")


def locate_gguf(model: str, revision: str | None = None) -> Path:
    """The path of the model's first or only file; downloads it for a hub id.

    Raises:
        CheckpointError: the file, repository or quantisation does not exist.
    """
    path = Path(model).expanduser()
    named = _HUB.fullmatch(model)
    if path.exists() or named is None:
        if revision is not None:
            raise CheckpointError(
                f"--revision: {model} is a file on this machine, which has no revisions; leave it out"
            )
        if not path.is_file():
            raise CheckpointError(f"--model: there is no file {model}; give a .gguf file")
        return path
    from huggingface_hub import hf_hub_download

    repository, wanted = named.groups()
    with hub_errors(repository, revision):
        parts = choose_files(_listed(repository, revision), wanted, repository)
        paths = [Path(hf_hub_download(repository, part, revision=revision)) for part in parts]
        return paths[0]


def read_headers(model: str, revision: str | None = None) -> GgufFile:
    """Read a model's headers; for a hub id, downloads nothing else.

    Raises:
        CheckpointError: see `locate_gguf` and `open_gguf`.
    """
    named = _HUB.fullmatch(model)
    if named is None or Path(model).expanduser().exists():
        return open_gguf(locate_gguf(model, revision))
    from huggingface_hub import HfFileSystem

    repository, wanted = named.groups()
    with hub_errors(repository, revision):
        first, *_ = choose_files(_listed(repository, revision), wanted, repository)
        files = HfFileSystem()

        def open_remote(path: Path) -> tuple[BinaryIO, int]:
            stream = files.open(path.as_posix(), "rb", revision=revision, block_size=_REMOTE_BLOCK_BYTES)
            return stream, int(stream.size)

        return open_gguf(f"{repository}/{first}", open_remote)


def choose_files(names: list[str], wanted: str, repository: str) -> list[str]:
    """The files of a repository that make up one model, in order.

    Args:
        names: all files of the repository.
        wanted: a file name, or a quantisation as in file names (`Q4_K_M`).
        repository: name of the repository, for error messages.

    Raises:
        CheckpointError: no model or several models match; the message lists the candidates.
    """
    models = [name for name in sorted(names) if name.lower().endswith(_SUFFIX) and _PROJECTOR not in name.lower()]
    firsts = [name for name in models if _FIRST_PART.search(name) or not _LATER_PART.search(name)]
    if wanted.lower().endswith(_SUFFIX):
        found = [name for name in firsts if wanted in {name, PurePosixPath(name).name}]
    else:
        whole = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(wanted)}(?![A-Za-z0-9_])", re.IGNORECASE)
        found = [name for name in firsts if whole.search(name)]
    if len(found) != 1:
        offered = ", ".join(PurePosixPath(name).name for name in found or firsts) or "no GGUF file"
        problem = "names several models" if found else "is not there"
        raise CheckpointError(f"--model: {wanted} {problem} in {repository}; it has {offered}")
    first = _FIRST_PART.search(found[0])
    if first is None:
        return found
    stem = found[0][: first.start()]
    return [name for name in models if name.startswith(stem) and _LATER_PART.fullmatch(name[len(stem) :])]


def _listed(repository: str, revision: str | None) -> list[str]:
    """The files of a repository; in offline mode, those in the local cache."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return list(list_repo_files(repository, revision=revision))
    except OfflineModeIsEnabled:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        return [path.relative_to(folder).as_posix() for path in folder.rglob(f"*{_SUFFIX}")]
