"""What policies learned, kept from one run to the next: expert maps in files. See docs/maps.md."""

from finemoe.maps.file import read_maps, write_maps
from finemoe.maps.folder import FolderMaps
from finemoe.maps.keeper import NOWHERE, Keeper, open_keeper, refuse_useless
from finemoe.maps.maps import Maps
from finemoe.maps.merge import merge
from finemoe.maps.news import counted_once, experience, news
from finemoe.maps.prune import prune
from finemoe.maps.shared import SHARED_MAPS, LocalMaps, Pulled, SharedMaps, Version

__all__ = [
    "NOWHERE",
    "SHARED_MAPS",
    "FolderMaps",
    "Keeper",
    "LocalMaps",
    "Maps",
    "Pulled",
    "SharedMaps",
    "Version",
    "counted_once",
    "experience",
    "merge",
    "news",
    "open_keeper",
    "prune",
    "read_maps",
    "refuse_useless",
    "write_maps",
]
