"""What policies learned, kept from one run to the next: expert maps in files. See docs/maps.md."""

from finemoe.maps.file import read_maps, write_maps
from finemoe.maps.keeper import NOWHERE, Keeper, open_keeper, refuse_useless
from finemoe.maps.maps import Maps
from finemoe.maps.merge import merge
from finemoe.maps.prune import prune

__all__ = ["NOWHERE", "Keeper", "Maps", "merge", "open_keeper", "prune", "read_maps", "refuse_useless", "write_maps"]
