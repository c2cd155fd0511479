"""What policies learned (expert maps): saved, restored, merged, pruned and shared. See docs/maps.md."""

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
    "check_map_store",
    "merge",
    "new_maps",
    "num_updates",
    "open_map_persistence",
    "prune",
    "read_maps",
    "with_new_totals",
    "write_maps",
]
