"""Whether arrays are what a policy's `recall` may trust: compiled kernels check no bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.policy.trail import NOBODY

Arrays = Mapping[str, npt.NDArray[Any]]
# dtype and shape; letters are sizes, n the number of maps
_OF_ROWS = {
    "weights": ("uint8", "nLK"), "tokens": ("int32", "n"), "before": ("int32", "n"), "usual": ("float64", "LE"),
    "iterations": ("float64", "L"), "number": ("int64", "1"), "active": ("int64", "1"), "lookahead": ("float64", "W"),
}  # fmt: skip
_OF_MAPS = {
    "maps": ("float32", "nLE"), "tokens": ("int64", "n"), "born": ("int64", "n"), "p": ("float64", "LE"),
    "visits": ("float64", "LE"), "active": ("int64", "1"),
}  # fmt: skip
_OF_OPENINGS = {"openings": ("float32", "RD"), "opened": ("float32", "RLE")}
_SIGNED = {"tokens", "keys", "before", "lookahead", "openings"}


def fault(arrays: Arrays, layers: int, experts: int) -> str | None:
    """What is wrong with the arrays of a policy; `None` if nothing is."""
    linked = "before" in arrays
    expected = dict(_OF_ROWS if linked else _OF_MAPS)
    sizes = {"L": layers, "E": experts, "1": 1, "n": int(np.size(arrays.get("tokens", ())))}
    sizes["W"] = max(3, int(np.size(arrays.get("lookahead", ()))) // 3 * 3)  # three weights for each distance
    if linked:
        expected["ids"] = ("uint8" if experts <= np.iinfo(np.uint8).max else "uint16", "nLK")
        sizes["K"] = arrays["ids"].shape[-1] if "ids" in arrays and arrays["ids"].ndim else 0
        if "openings" in arrays or "opened" in arrays:
            expected |= _OF_OPENINGS
            sizes["R"], sizes["D"] = (*arrays["openings"].shape, 0, 0)[:2] if "openings" in arrays else (0, 0)
    elif "keys" in arrays:
        expected["keys"] = ("float32", "nD")
        sizes["D"] = arrays["keys"].shape[-1] if arrays["keys"].ndim else 0
    if odd := sorted(set(arrays) ^ set(expected)):
        return f"{odd[0]} is {'missing' if odd[0] in expected else 'unknown'}"
    for name, (dtype, letters) in expected.items():
        shape = tuple(sizes[letter] for letter in letters)
        if arrays[name].dtype != dtype or arrays[name].shape != shape:
            return f"{name} is {arrays[name].dtype} {list(arrays[name].shape)} and should be {dtype} {list(shape)}"
    for name, array in arrays.items():
        if not np.isfinite(array).all() or (name not in _SIGNED and (array < 0).any()):
            return f"{name} has values that are no share or count"
    if not sizes["n"]:
        return "there is no map in it"
    return _of_rows(arrays, experts) if linked else _of_maps(arrays, experts)


def _of_rows(arrays: Arrays, experts: int) -> str | None:
    before, n = arrays["before"], len(arrays["before"])
    if not 1 <= arrays["ids"].shape[2] <= experts or (arrays["ids"] > experts).any():
        return f"ids has experts beyond {experts}"
    if (before < NOBODY).any() or (before >= np.arange(n)).any():
        return "before has a link to a row that is not older"
    if np.bincount(before[before != NOBODY], minlength=1).max() > 1:
        return "before has two links to one row"
    if arrays["number"][0] < n or arrays["active"][0] > experts:
        return "its counts contradict each other"
    return None


def _of_maps(arrays: Arrays, experts: int) -> str | None:
    if (arrays["born"] < 1).any() or len(np.unique(arrays["born"])) < len(arrays["born"]):
        return "born has numbers that are no order"
    if arrays["active"][0] > experts:
        return f"active is beyond {experts}"
    return None
