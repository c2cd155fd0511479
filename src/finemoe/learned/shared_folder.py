"""Maps shared through a common folder: on a disk, or in any storage that fsspec supports.

Each process writes one file with what it has learned itself, and reads those of the others: no file has two writers.
"""

from __future__ import annotations

import logging
import re
import tempfile
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finemoe.errors import ConfigError, MapsError
from finemoe.learned.file import read_maps, write_maps
from finemoe.learned.maps import Maps
from finemoe.learned.sharing import SHARED_MAPS, Pulled, Version, merge_newest

_LOG = logging.getLogger(__name__)
_MOST_FILES = 64  # in the folder; if there are more, the oldest are removed
_ENDING = ".maps.safetensors"
_STAMP_KEYS = ("mtime", "ino", "LastModified", "last_modified", "updated", "etag", "ETag", "created")
_Stamp = tuple[str, ...]


class FolderMaps:
    """`SharedMaps` in a folder, as seen by one process.

    A file that is damaged, or for another model or policy, is skipped with a warning.

    Args:
        url: of the folder, for fsspec: a path, `s3://bucket/maps`. It is created if it does not exist.
        model: the model's fingerprint.
        policy: name of the policy.
        limit: how many maps are kept, in the own file and when all files are merged.

    Raises:
        ConfigError: fsspec does not know the URL's scheme, or the library for it is not installed.
    """

    def __init__(self, url: str, model: str, policy: str, limit: int = SHARED_MAPS) -> None:
        import fsspec

        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"--shared-maps: can't use {url!r} ({error})") from error
        self._folder = f"{str(root).rstrip('/')}/{model}-{policy}"
        self._url = url
        self._model, self._policy, self._limit = model, policy, limit
        self._name = f"{uuid.uuid4().hex}{_ENDING}"
        self._lock = threading.Lock()
        self._own: Maps | None = None
        self._seen: dict[str, _Stamp] = {}
        self._others: dict[str, Maps] = {}
        self._version = Version(uuid.uuid4().hex, 0)

    def publish(self, maps: Maps) -> Version:
        """See `SharedMaps`. The process's previous file is replaced only when the new one is complete."""
        with self._lock:
            self._check_compatible(maps)
            own = maps if self._own is None else merge_newest([self._own, maps], self._limit)
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / self._name
                write_maps(own, local)
                self._files.makedirs(self._folder, exist_ok=True)
                part = f"{self._folder}/.{self._name}.part"
                self._files.put_file(str(local), part)
                self._files.mv(part, f"{self._folder}/{self._name}")
            self._own = own
            return self._next_version()

    def pull(self, since: Version | None = None) -> Pulled | None:
        """See `SharedMaps`."""
        with self._lock:
            listed = self._list_others()
            if listed != self._seen:
                self._read(listed)
                self._next_version()
            if since == self._version:
                return None
            stores = [*self._others.values(), *([] if self._own is None else [self._own])]
            return Pulled(self._version, merge_newest(stores, self._limit) if stores else None)

    def _next_version(self) -> Version:
        self._version = self._version._replace(number=self._version.number + 1)  # noqa: SLF001 - public in named tuples
        return self._version

    def _list_others(self) -> dict[str, _Stamp]:
        """The newest files of other processes, with stamps to detect changes; surplus files are removed."""
        self._files.invalidate_cache()
        try:
            entries: list[Mapping[str, Any]] = self._files.ls(self._folder, detail=True)
        except FileNotFoundError:
            return {}
        stamps = {
            str(each["name"]).rpartition("/")[2]: (*(str(each.get(key)) for key in _STAMP_KEYS), str(each.get("size")))
            for each in entries
        }
        names = sorted((name for name in stamps if _is_map_file(name)), key=stamps.__getitem__, reverse=True)
        for name in names[_MOST_FILES:]:
            if name != self._name:
                with suppress(OSError):  # another process has removed it
                    self._files.rm_file(f"{self._folder}/{name}")
        return {name: stamps[name] for name in names[:_MOST_FILES] if name != self._name}

    def _read(self, listed: dict[str, _Stamp]) -> None:
        kept = {name: maps for name, maps in self._others.items() if self._seen.get(name) == listed.get(name)}
        for name, stamp in listed.items():
            if self._seen.get(name) == stamp:
                continue
            try:
                kept[name] = self._fetch(name)
            except FileNotFoundError:
                continue
            except MapsError as error:
                _LOG.warning("%s; going on without", error)
        self._others, self._seen = kept, listed

    def _fetch(self, name: str) -> Maps:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / name
            self._files.get_file(f"{self._folder}/{name}", str(local))
            try:
                maps = read_maps(local)
            except MapsError as error:
                raise type(error)(str(error).replace(str(local), f"{self._url}: {name}")) from error
        self._check_compatible(maps)
        return maps

    def _check_compatible(self, maps: Maps) -> None:
        mine = self._own or next(iter(self._others.values()), maps)
        if (maps.model, maps.policy) != (self._model, self._policy) or (
            mine is not maps and mine.incompatibility(maps)
        ):
            raise MapsError(
                f"{self._url}: has maps of {maps.name} under --policy {maps.policy}, not of this model and policy"
            )


def _is_map_file(name: str) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{32}}{re.escape(_ENDING)}", name) is not None
