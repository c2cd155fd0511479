"""Where this program keeps what it made for a user, and how it replaces a file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finemoe.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def user_cache() -> Path:
    """`FINEMOE_CACHE`, else `finemoe` in `XDG_CACHE_HOME`, else `~/.cache/finemoe`. It need not exist."""
    if own := os.environ.get("FINEMOE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "finemoe"


def user_maps() -> Path | None:
    """Where policies that learn keep their maps: `FINEMOE_MAPS`, else `maps` in `user_cache`; `None` for `none`."""
    own = os.environ.get("FINEMOE_MAPS")
    if own == "none":
        return None
    return Path(own).expanduser() if own else user_cache() / "maps"


def user_experts() -> Path:
    """Where quantised copies of experts are kept."""
    return user_cache() / "experts"


def refuse_unwritable(flag: str, path: Path) -> None:
    """Ahead of the work whose result is to be written to a file that a user named.

    Raises:
        ConfigError: its folder is missing (a mistyped one is not made), it is a folder, or can't be written.
    """
    if wrong := unwritable(path):
        raise ConfigError(f"{flag}: {wrong}")


def unwritable(path: Path) -> str | None:
    """Why a file can't be written there; `None` if it seems that it can."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"there is no folder {folder}; make it, or give another"
    if path.is_dir():
        return f"{path} is a folder; give a file in it"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{path} can't be written (no permission in {folder})"


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the older one or this one, never a part; makes its folder.

    Raises:
        OSError: it can't be written; an older file is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not mkstemp's: others may read what they could
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Processes that enter this for the same folder wait for each other; makes the folder.

    Where a folder can't be locked, they do not: network file systems without locks, Windows.

    Raises:
        OSError: it can't be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
