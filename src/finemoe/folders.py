"""Where this program keeps what it made for a user."""

from __future__ import annotations

import os
from pathlib import Path


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
