"""Computes missing experts on the host's CPU, in parallel with the device, where that is faster than copying them.

Only pays for few tokens, as the CPU reads an expert's weights once, just as a copy would. The costs are measured at
load. An expert computed on the host counts as a miss, and is not loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finemoe.engine.expert_layer import apply_expert
from finemoe.gpu.copier import HostToDeviceCopier
from finemoe.gpu.device import Device
from finemoe.types import ExpertId

MAX_TOKENS = 16  # of a pass; with more, hidden states are not copied to the host
_SAMPLE_BYTES = 256 << 20  # of weights: more than fit into the CPU's caches
_SAMPLE_ROWS = (1, 4, 16)
HostViews = Callable[[ExpertId, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class HybridCosts:
    """Measured seconds."""

    copy_s: float  # of one expert to the device
    fixed_s: float  # of one expert on the CPU
    row_s: float  # of each of its rows, in addition

    def on_host_s(self, rows: int) -> float:
        return self.fixed_s + rows * self.row_s


def split_misses(rows: Sequence[int], costs: HybridCosts) -> list[int]:
    """The missing experts to compute on the host, so that the slower of host and link is done as early as possible.

    Args:
        rows: of each expert; those with the fewest are given to the host first.
        costs: as measured.

    Returns:
        Indices into `rows`.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    host_s = [0.0, *np.cumsum([costs.on_host_s(rows[i]) for i in order]).tolist()]
    done_s = [max(own, (len(rows) - count) * costs.copy_s) for count, own in enumerate(host_s)]
    return order[: done_s.index(min(done_s))]


class HostCompute:
    """A thread that computes experts from the host tier.

    Args:
        copier: has the host tier.
        views: an expert's parameters as views of its bytes there.
        costs: as measured.
    """

    def __init__(self, copier: HostToDeviceCopier, views: HostViews, costs: HybridCosts) -> None:
        self.copier = copier
        self.views = views
        self.costs = costs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="finemoe-host-compute")

    def submit(self, work: Callable[..., Tensor], *arguments: Any) -> Future[Tensor]:
        return self._thread.submit(work, *arguments)

    def close(self) -> None:
        """Finishes submitted work and ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=False)


class HybridSplit:
    """Splits the misses of one layer's call between the link and the host.

    Args:
        host: computes the host's share.
        module: the experts module.
        layer: its index.
        hidden: `[T, D]` in host memory.
        tokens: of each expert's rows.
    """

    def __init__(
        self, host: HostCompute, module: Any, layer: int, hidden: Tensor, tokens: Mapping[int, Sequence[int]]
    ) -> None:
        self._host = host
        self._module = module
        self._layer = layer
        self._hidden = hidden
        self._tokens = tokens
        self._started: dict[int, Future[Tensor]] = {}

    def choose(self, missing: Sequence[int]) -> list[int]:
        """Starts computing some of the missing experts that the host tier has, and returns them."""
        acquired: dict[int, Tensor] = {}
        try:
            for expert in missing:
                if (raw := self._host.copier.acquire(self._id(expert))) is not None:
                    acquired[expert] = raw
            experts = list(acquired)
            for i in split_misses([len(self._tokens[expert]) for expert in experts], self._host.costs):
                self._started[experts[i]] = self._host.submit(self._compute, experts[i], acquired[experts[i]])
                del acquired[experts[i]]  # `_compute` releases it
        finally:
            for expert in acquired:
                self._host.copier.release(self._id(expert))
        return list(self._started)

    def results(self) -> Iterator[tuple[int, Tensor]]:
        """Each chosen expert and its output `[n, D]` in host memory. Waits for them."""
        for expert, output in self._started.items():
            yield expert, output.result()

    def _id(self, expert: int) -> ExpertId:
        return ExpertId(self._layer, expert)

    def _compute(self, expert: int, raw: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                x = self._hidden[torch.tensor(self._tokens[expert])]
                return apply_expert(self._module, self._host.views(self._id(expert), raw), x)
        finally:
            self._host.copier.release(self._id(expert))


def measure_costs(
    device: Device, module: Any, views: Callable[[Tensor], dict[str, Tensor]], expert_bytes: int, x: Tensor
) -> HybridCosts:
    """Measures copying and computing an expert on this machine. Takes a fraction of a second.

    Args:
        device: to copy to.
        module: an experts module.
        views: an expert's parameters as views of its bytes in host memory.
        expert_bytes: of one expert.
        x: a hidden state `[1, D]` in host memory, of the dtype of experts' inputs.
    """
    count = max(2, min(32, _SAMPLE_BYTES // expert_bytes))
    sample = torch.zeros(count, expert_bytes, dtype=torch.uint8)
    into = device.allocate(expert_bytes)
    device.pin(sample)
    try:
        copies_s = []
        for source in sample:
            start = device.record_copies()
            device.copy(into, source)
            end = device.record_copies()
            end.wait()
            copies_s.append(end.since_s(start))
    finally:
        device.unpin(sample)
    computed_s = []
    with torch.no_grad():
        for rows in _SAMPLE_ROWS:
            times_s = []
            for source in sample:
                start_s = time.perf_counter()
                apply_expert(module, views(source), x.expand(rows, -1))
                times_s.append(time.perf_counter() - start_s)
            computed_s.append(float(np.median(times_s)))
    return HybridCosts(float(np.median(copies_s)), *fit_line(_SAMPLE_ROWS, computed_s))


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Least squares, with both coefficients at least 0: fixed seconds, and seconds per unit of size."""
    slope, fixed = np.polyfit(np.asarray(sizes, float), np.asarray(seconds, float), 1)
    slope = max(0.0, float(slope))
    return max(0.0, min(float(fixed), *seconds)), slope
