"""Missing experts computed where they are: on the host's CPU, beside the device, where that beats copying them.

Worth it for few tokens: the CPU reads an expert's weights once, as the copy would. How it compares is measured at load.
An expert computed here is a miss that brings nothing in.
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

MOST_TOKENS = 16  # of a pass: beyond, hidden states are not even brought to the host
_SAMPLE_BYTES = 256 << 20  # of weights, so that they do not come out of the CPU's caches
_ROWS = (1, 4, 16)
Views = Callable[[ExpertId, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Costs:
    """Seconds, as measured."""

    copy_s: float  # of one expert over the link
    fixed_s: float  # of one expert on the CPU
    row_s: float  # and of each row more

    def on_host_s(self, rows: int) -> float:
        return self.fixed_s + rows * self.row_s


def share(rows: Sequence[int], costs: Costs) -> list[int]:
    """Which of the missing experts to compute on the host, so that host and link are done as early as can be.

    Args:
        rows: how many rows each has; those with the fewest go to the host first.

    Returns:
        Indices into `rows`.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    host_s = [0.0, *np.cumsum([costs.on_host_s(rows[i]) for i in order]).tolist()]
    done_s = [max(own, (len(rows) - count) * costs.copy_s) for count, own in enumerate(host_s)]
    return order[: done_s.index(min(done_s))]


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """A line through measurements, neither part of it below 0: fixed seconds, and seconds for each unit of size."""
    slope, fixed = np.polyfit(np.asarray(sizes, float), np.asarray(seconds, float), 1)
    slope = max(0.0, float(slope))
    return max(0.0, min(float(fixed), *seconds)), slope


def measure(
    device: Device, module: Any, views: Callable[[Tensor], dict[str, Tensor]], expert_bytes: int, x: Tensor
) -> Costs:
    """What copying and computing an expert cost here. Takes a fraction of a second.

    Args:
        device: that is copied to.
        module: an experts module.
        views: an expert's parameters out of its bytes in host memory.
        expert_bytes: of one expert.
        x: a hidden state `[1, D]` in host memory, of the dtype that experts get.
    """
    count = max(2, min(32, _SAMPLE_BYTES // expert_bytes))
    sample = torch.zeros(count, expert_bytes, dtype=torch.uint8)
    into = device.allocate(expert_bytes)
    device.pin(sample)
    try:
        copies = []
        for source in sample:
            start = device.mark_copies()
            device.copy(into, source)
            end = device.mark_copies()
            end.wait()
            copies.append(end.since_s(start))
    finally:
        device.unpin(sample)
    computed = []
    with torch.no_grad():
        for rows in _ROWS:
            times = []
            for source in sample:
                start_s = time.perf_counter()
                apply_expert(module, views(source), x.expand(rows, -1))
                times.append(time.perf_counter() - start_s)
            computed.append(float(np.median(times)))
    return Costs(float(np.median(copies)), *fit(_ROWS, computed))


class HostCompute:
    """A thread that computes experts out of the host tier.

    Args:
        link: has the host tier.
        views: an expert's parameters out of its bytes there.
        costs: as measured.
    """

    def __init__(self, link: HostToDeviceCopier, views: Views, costs: Costs) -> None:
        self.link = link
        self.views = views
        self.costs = costs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="finemoe-aside")

    def submit(self, work: Callable[..., Tensor], *arguments: Any) -> Future[Tensor]:
        return self._thread.submit(work, *arguments)

    def close(self) -> None:
        """Ends the thread, after the work under way."""
        self._thread.shutdown(wait=True, cancel_futures=False)


class HybridSplit:
    """One layer's share of the work for the host.

    Args:
        host: who computes.
        module: the experts module.
        layer: its index.
        hidden: `[T, D]` in host memory.
        tokens: the tokens of each expert's rows.
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
        """Takes on some of the experts that miss, and begins."""
        held: dict[int, Tensor] = {}
        try:
            for expert in missing:
                if (raw := self._host.link.hold(self._id(expert))) is not None:
                    held[expert] = raw
            here = list(held)
            for i in share([len(self._tokens[expert]) for expert in here], self._host.costs):
                self._started[here[i]] = self._host.submit(self._compute, here[i], held[here[i]])
                del held[here[i]]  # `_compute` lets go of it
        finally:
            for expert in held:
                self._host.link.release(self._id(expert))
        return list(self._started)

    def results(self) -> Iterator[tuple[int, Tensor]]:
        """Expert and its output `[n, D]` in host memory, for each that was taken on. Waits for them."""
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
            self._host.link.release(self._id(expert))
