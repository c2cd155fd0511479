"""Builds the checkpoint from a dense source and a bundle: resumable, verified, renamed into place when complete."""

import json
import shutil
from pathlib import Path

from finemoe.errors import ReferenceModelError
from finemoe.model.reference.bundle import Bundle
from finemoe.model.reference.dense import DenseSource
from finemoe.model.reference.mixture import generation_config, mixture_bytes, mixture_config
from finemoe.model.reference.shards import plan_shards, read_index, write_index, write_shard

MARGIN_BYTES = 64 << 20
PROVENANCE = "provenance.json"


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raises `ReferenceModelError` unless the disk of `folder` has `needed_bytes` plus a margin free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + MARGIN_BYTES:
        raise ReferenceModelError(
            f"{folder} has {free / 1e9:.2f} GB free, the reference model needs "
            f"{(needed_bytes + MARGIN_BYTES) / 1e9:.2f} GB; free some, or point FINEMOE_CACHE at another disk"
        )


def provenance(source: DenseSource, bundle: Bundle) -> dict[str, str]:
    """Identifies a build's inputs: builds with equal provenance are equal."""
    return {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "source": source.label,
        "revision": source.revision,
        "bundle_version": bundle.version,
        "bundle_sha256": bundle.sha256,
    }


def build(source: DenseSource, bundle: Bundle, work: Path, target: Path, *, progress: bool) -> None:
    """Writes the mixture into `work`, verifies it, and renames it to `target`, which it replaces.

    Finished shards of an interrupted build from the same source and bundle are reused.

    Raises:
        ReferenceModelError: the source does not fit the bundle, or the disk is full.
    """
    from safetensors import SafetensorError
    from tqdm import tqdm

    bundle.check_fits(source.shape)
    _claim(work, provenance(source, bundle))
    shards = plan_shards(source, bundle)
    missing = [name for name in shards if not (work / name).exists()]
    require_disk(work, mixture_bytes(source.shape, bundle) * len(missing) // len(shards))
    hidden = None if progress else True  # None: only on a terminal
    done = len(shards) - len(missing)
    with tqdm(total=len(shards), initial=done, unit="shard", desc="reference model", disable=hidden) as bar:
        for name in missing:
            try:
                write_shard(work / name, shards[name]())
            except (OSError, SafetensorError) as error:
                raise ReferenceModelError(
                    f"cannot write {work / name} ({error}); free the disk and try again"
                ) from error
            bar.update()
    _write_rest(source, bundle, work)
    _verify(source, bundle, work, list(shards))
    (work / "source.gguf").unlink(missing_ok=True)
    if target.exists():
        shutil.rmtree(target)  # incomplete: files were deleted from it; the caller holds the lock
    work.replace(target)


def _claim(work: Path, made_from: dict[str, str]) -> None:
    """Deletes shards in `work` of another source or bundle, and records this build's provenance."""
    path = work / PROVENANCE
    try:
        previous = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        previous = None
    if previous != made_from:
        for old in work.glob("model*"):
            old.unlink()
    for part in work.glob("*.part"):
        part.unlink()
    path.write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")


def _write_rest(source: DenseSource, bundle: Bundle, work: Path) -> None:
    """Writes the configuration and tokenizer files."""
    shape = source.shape
    documents = {"config.json": mixture_config(shape, bundle), "generation_config.json": generation_config(shape)}
    for name, document in documents.items():
        (work / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    source.write_tokenizer(work)


def _verify(source: DenseSource, bundle: Bundle, work: Path, names: list[str]) -> None:
    """Writes the index of the shards; raises `ReferenceModelError` if their total size is wrong."""
    index = read_index(work, dict.fromkeys(names))
    metadata = index["metadata"]
    expected = mixture_bytes(source.shape, bundle)
    if metadata != {"total_size": expected}:
        raise ReferenceModelError(
            f"the build in {work} holds {metadata}, expected {expected} bytes of weights; delete it and try again"
        )
    write_index(work, index)
