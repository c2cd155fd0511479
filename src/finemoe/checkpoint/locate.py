"""Finds a model's files: from a local folder, or a hub id, which is downloaded into the hub's cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finemoe.checkpoint.headers import TensorHeader, read_headers
from finemoe.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OTHER_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine: its folder, and its weight files sorted by name."""

    name: str  # as the user gave it
    folder: Path
    files: tuple[Path, ...]


def locate(model: str, revision: str | None = None) -> Checkpoint:
    """Find a model's files, downloading them if `model` is a hub id.

    Raises:
        CheckpointError: no such folder or hub id, no safetensors weights, or a shard of the index is missing; or a
            revision of a folder.
    """
    folder = Path(model).expanduser()
    if revision is not None and folder.is_dir():
        raise CheckpointError(f"--revision: {model} is a folder on this machine, it has no revisions; leave it out")
    if not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"--model: {model} is a file; give the folder that holds config.json")
        if _is_local(model):
            raise CheckpointError(f"--model: there is no folder {model}")
        folder = _download(model, revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"--model: {folder} has no config.json; is it the folder of a Hugging Face model?")
    return Checkpoint(model, folder, weight_files(folder))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder.

    Raises:
        CheckpointError: there are none, or the index names one that is missing.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    if not index.is_file():
        others = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".gguf", ".pth"}]
        hint = f" (it has {others[0]}; only safetensors are read)" if others else ""
        raise CheckpointError(f"--model: {folder} has neither {_SINGLE} nor {_INDEX}{hint}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = tuple(folder / name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a valid safetensors index ({error})") from error
    if not files:
        raise CheckpointError(f"{index}: not a valid safetensors index (it names no shard)")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: the index names this shard, but it is missing; fetch the model again")
    return files


def locate_headers(model: str, revision: str | None = None) -> tuple[Path, dict[str, TensorHeader]]:
    """A model's folder and the headers of all its tensors. No weights of a hub model are downloaded.

    File numbers of a hub model count its files sorted by name; offsets count from the start of the tensors' data.

    Raises:
        CheckpointError: as `locate`.
    """
    if _is_local(model):
        checkpoint = locate(model, revision)
        return checkpoint.folder, read_headers(checkpoint.files)
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with hub_errors(model, revision):
        folder = Path(hf_hub_download(model, "config.json", revision=revision)).parent
        try:
            metadata = get_safetensors_metadata(model, revision=revision)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise CheckpointError(f"--model: {model} has no usable safetensors on the hub") from error
    headers = {}
    for index, name in enumerate(sorted(metadata.files_metadata)):
        for key, info in metadata.files_metadata[name].tensors.items():
            begin, end = info.data_offsets
            headers[key] = TensorHeader(index, begin, end - begin, str(info.dtype), tuple(info.shape))
    return folder, headers


def _is_local(model: str) -> bool:
    folder = Path(model).expanduser()
    return folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(model, revision):
        patterns = [*_OTHER_FILES, *_hub_weights(model, revision)]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


def _hub_weights(model: str, revision: str | None) -> list[str]:
    """Names of the weight files in the index; some repositories hold the same weights in other files, too."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        index = Path(hf_hub_download(model, _INDEX, revision=revision))
    except (EntryNotFoundError, LocalEntryNotFoundError):  # one file, or offline
        return [_SINGLE]
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a valid safetensors index ({error})") from error


@contextmanager
def hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub client into a `CheckpointError` of one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(f"--model: {model!r} is neither a folder nor a hub id") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"--model: {model} is gated; accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"--revision: {model} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"--model: no folder {model} here, and no such model on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"--model: no folder {model} here, and it can't be fetched from the hub: {reason}"
        ) from error
