"""What policies learned, kept from one run to the next: expert maps in files. See docs/maps.md."""

from finemoe.learned.compaction import merge, prune
from finemoe.learned.file import read_maps, write_maps
from finemoe.learned.maps import Maps
from finemoe.learned.persistence import NOWHERE, MapPersistence, open_map_persistence, refuse_useless
from finemoe.learned.shared_folder import FolderMaps
from finemoe.learned.sharing import SHARED_MAPS, LocalMaps, Pulled, SharedMaps, Version, counted_once, news, num_updates

__all__ = [
    "NOWHERE",
    "SHARED_MAPS",
    "FolderMaps",
    "LocalMaps",
    "MapPersistence",
    "Maps",
    "Pulled",
    "SharedMaps",
    "Version",
    "counted_once",
    "merge",
    "news",
    "num_updates",
    "open_map_persistence",
    "prune",
    "read_maps",
    "refuse_useless",
    "write_maps",
]
