"""What policies learned, kept from one run to the next: expert maps in files. See docs/maps.md."""

from finemoe.learned.compaction import merge, prune
from finemoe.learned.file import read_maps, write_maps
from finemoe.learned.maps import Maps
from finemoe.learned.persistence import NO_MAP_STORE, MapPersistence, check_map_store, open_map_persistence
from finemoe.learned.shared_folder import FolderMaps
from finemoe.learned.sharing import (
    SHARED_MAPS,
    LocalMaps,
    Pulled,
    SharedMaps,
    Version,
    new_maps,
    num_updates,
    with_new_totals,
)

__all__ = [
    "NO_MAP_STORE",
    "SHARED_MAPS",
    "FolderMaps",
    "LocalMaps",
    "MapPersistence",
    "Maps",
    "Pulled",
    "SharedMaps",
    "Version",
    "with_new_totals",
    "merge",
    "news",
    "num_updates",
    "open_map_persistence",
    "prune",
    "read_maps",
    "check_map_store",
    "write_maps",
]
