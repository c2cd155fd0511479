"""Makes a model take recorded routing: whatever its routers choose, its experts modules get what was recorded.

It works where experts modules are called, so on a model of finemoe's and on transformers' own alike, and two models
with the same weights, prompts and trace give the same tokens. Routers still run, at their cost.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finemoe.engine.expert_layer import HANDLE
from finemoe.errors import ConfigError, TraceError, UnsupportedModelError
from finemoe.model.introspect import active_experts, find_experts, read_pass
from finemoe.trace import DECODE, PREFILL, Trace, open_trace

Rows = NDArray[np.int64]


def open_routing(path: str | Path) -> Trace:
    """A trace to be replayed.

    Raises:
        TraceError: it can't be read, or does not say how much weight each expert had.
    """
    try:
        trace = open_trace(path)
    except TraceError as error:
        raise TraceError(f"--replay-routing: {error}") from error
    if not {"weights", "probs"} & set(trace.header.fields):
        raise TraceError(f"--replay-routing: {path} has neither weights nor probs, only which experts ran")
    return trace


def check_fit(trace: Trace, model: str, layers: int, experts: Sequence[int], active: int) -> None:
    """Refuses a trace of another shape. A model with fewer layers takes the routing of the trace's first ones.

    Args:
        model: its name, for people.
        experts: how many each MoE layer has.
        active: of a token, in a layer.

    Raises:
        ConfigError: the model has more layers, or other numbers of experts.
    """
    header = trace.header
    if layers > header.layers or set(experts) != {header.experts} or active != header.active:
        shape = " or ".join(map(str, sorted(set(experts))))
        raise ConfigError(
            f"--replay-routing: {trace.path} routes to {header.active} of {header.experts} experts in {header.layers} "
            f"layers, {model} to {active} of {shape} in {layers}; give a trace of its shape"
        )


class Course:
    """The rows that one running request takes, as indices into the trace's columns.

    Args:
        trace: what is replayed.
        untaken: recorded requests that no request took yet; shared by all that run.
    """

    def __init__(self, trace: Trace, untaken: Iterator[int]) -> None:
        self._trace = trace
        self._untaken = untaken
        self._prompt, self._decoded = self._take()
        self._fed = 0  # tokens of the prompt
        self._steps = 0

    def feed(self, tokens: int) -> Rows:
        """Rows `[tokens]` of the prompt's next tokens."""
        at = np.arange(self._fed, self._fed + tokens)
        self._fed += tokens
        rows: Rows = self._prompt[at % len(self._prompt)] if len(self._prompt) else self._decoded[-1 - at % len(self)]
        return rows

    def step(self) -> Rows:
        """The row `[1]` of the next token that is decoded."""
        while self._steps == len(self):
            self._steps = 0
            _, self._decoded = self._take()
        self._steps += 1
        return self._decoded[self._steps - 1 : self._steps]

    def __len__(self) -> int:
        """Decoded iterations of the recorded request that is being replayed."""
        return len(self._decoded)

    def _take(self) -> tuple[Rows, Rows]:
        index = next(self._untaken, None)
        if index is None:
            raise TraceError(
                f"--replay-routing: all {len(self._trace)} requests of {self._trace.path} are replayed; ask for fewer "
                "or shorter answers, or give a longer trace"
            )
        request = self._trace.request(index)
        phases = np.repeat(request.phases, np.diff(request.rows))
        first = int(self._trace.row_offsets[index])
        prompt, decoded = (first + np.flatnonzero(phases == phase) for phase in (PREFILL, DECODE))
        return prompt, decoded


def replay_routing(model: Any, trace: str | Path | Trace) -> Replay:
    """Force the routing of `trace` onto `model` from its next forward pass on, its first request first.

    Policies hear the recorded gates, and recorded lookahead where there is any. What they learn is not kept.

    Args:
        model: from `finemoe.load` (with `map_store="none"` if its policy learns), or transformers' own.
        trace: a file, or an open trace.

    Raises:
        TraceError: the trace can't be read or replayed.
        ConfigError: it is of another shape, or lacks what the model's policy needs.
        UnsupportedModelError: the model's layers share experts.
    """
    return Replay(model, trace if isinstance(trace, Trace) else open_routing(trace))


class Replay:
    """Recorded routing, attached to a model; see `replay_routing`.

    A request is a row of the batch; it begins with a pass that has no past.
    """

    def __init__(self, model: Any, trace: Trace) -> None:
        self.trace = trace
        modules = _experts_modules(model)
        experts = [int(module.num_experts) for module in modules]
        check_fit(trace, type(model).__name__, len(modules), experts, active_experts(model.config))
        self.layers = len(modules)
        self.lookahead = trace.header.lookahead
        self.restart()
        if (offload := getattr(model, "finemoe", None)) is not None:
            offload.force_gates(self, str(trace.path))
        self._hooks = [
            model.register_forward_pre_hook(self._on_pass, with_kwargs=True, prepend=True),
            model.get_input_embeddings().register_forward_hook(self._on_embedding, prepend=True),
        ]
        for layer, module in enumerate(modules):
            force = self._forcing(layer, module)
            self._hooks.append(module.register_forward_pre_hook(force, with_kwargs=True, prepend=True))

    def restart(self) -> None:
        """Begin anew with the trace's first request, once the next request begins."""
        self._untaken = iter(range(len(self.trace)))
        self._courses: list[Course] = []
        self._rows: Tensor | None = None  # [T] of the pass
        self._fresh = True
        self._mask: Tensor | None = None

    def gates(self, layer: int) -> Tensor | None:
        """The recorded distributions `[T, E]` of the pass; `None` where they were not recorded."""
        return self._floats("probs", np.s_[:, layer])

    def ahead(self, layer: int, distance: int) -> Tensor | None:
        """`[T, E]`: what the gate `distance` layers on was recorded to say; `None` where it was not, or at the end."""
        if layer + distance >= self.layers or distance > self.lookahead:
            return None
        return self._floats("lookahead", np.s_[:, distance - 1, layer])

    def _floats(self, name: str, place: tuple[Any, ...]) -> Tensor | None:
        column = self.trace.column(name)
        if column is None or self._rows is None:
            return None
        return torch.from_numpy(column[place][self._rows.numpy()].astype(np.float32))

    def _on_pass(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._mask, self._fresh = read_pass(module, arguments, keywords)
        self._rows = None

    def _on_embedding(self, _module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._rows is not None or not arguments or output.dim() != 3:
            return  # some models embed more than once before their first layer
        batch, length = output.shape[:2]
        mask = np.ones((batch, length), bool)
        if self._mask is not None and self._mask[:, -length:].shape == mask.shape:
            mask = self._mask[:, -length:].bool().cpu().numpy()
        if self._fresh or len(self._courses) != batch:
            self._courses = [Course(self.trace, self._untaken) for _ in range(batch)]
        rows = np.zeros((batch, length), np.int64)
        for row, course in enumerate(self._courses):
            if length == 1 and not self._fresh:
                rows[row] = course.step()
                continue
            kept = np.flatnonzero(mask[row])
            taken = course.feed(len(kept))
            rows[row] = taken[0] if len(taken) else 0  # padding asks for nothing new
            rows[row, kept] = taken
        self._rows = torch.from_numpy(rows.reshape(-1))
        self._take()

    def _take(self) -> None:
        """Executed experts and weights `[T, L, K]` of the pass, renormalised.

        Where a token executed fewer than K, its first stands again with weight 0: it is nobody's need anew.
        """
        assert self._rows is not None
        rows, header = self._rows.numpy(), self.trace.header
        ids = self._column("expert_ids")[rows].astype(np.int64)
        ran = ids < header.experts
        ids = np.where(ran, ids, np.where(ran[..., :1], ids[..., :1], 0))
        if (recorded := self.trace.column("weights")) is not None:
            weights = recorded[rows].astype(np.float32)
        else:
            weights = np.take_along_axis(self._column("probs")[rows].astype(np.float32), ids, axis=2)
        weights = np.where(ran, weights, 0)
        weights /= np.maximum(weights.sum(2, keepdims=True), 1e-30)
        self._ids, self._weights = torch.from_numpy(ids), torch.from_numpy(weights)

    def _column(self, name: str) -> Any:
        column = self.trace.column(name)
        assert column is not None
        return column

    def _forcing(self, layer: int, module: nn.Module) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        signature = inspect.signature(type(module).forward)
        _, _, index, weights = list(signature.parameters)[:4]

        def force(
            module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            bound = signature.bind(module, *arguments, **keywords)
            given = bound.arguments
            if self._rows is None or given[index].shape[0] != len(self._rows):
                raise UnsupportedModelError("recorded routing can be replayed only where all tokens go through a layer")
            given[index] = self._ids[:, layer].to(given[index])
            given[weights] = self._weights[:, layer].to(given[weights])
            return bound.args[1:], bound.kwargs

        return force


def _experts_modules(model: Any) -> list[Any]:
    """The experts module of each MoE layer, in order, whoever holds its weights."""
    if hasattr(model, "finemoe"):
        handles = {id(module): module.__dict__[HANDLE].layer for module in model.modules() if HANDLE in module.__dict__}
        modules = sorted((m for m in model.modules() if id(m) in handles), key=lambda m: handles[id(m)])
        shared = any(handles[id(one)] == handles[id(other)] for one, other in pairwise(modules))
    else:
        found = find_experts(model)
        modules, shared = [module for _, module in found], any(described.same_as for described, _ in found)
    if shared:
        raise UnsupportedModelError(
            f"{type(model).__name__} shares experts between layers: its routing can't be replayed"
        )
    return modules
