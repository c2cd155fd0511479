"""Forces recorded routing onto a model: its experts modules get the recorded experts and weights, not its routers'.

Pre-hooks on the experts modules replace their arguments, so it works on offloaded models and on transformers' own, and
two models with the same weights, prompts and trace give the same tokens. The routers still run.
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

Rows = NDArray[np.int64]  # token rows: indices into a trace's columns


def open_routing(path: str | Path) -> Trace:
    """Opens a trace whose routing can be forced onto a model.

    Raises:
        TraceError: it can't be read, or has no expert weights.
    """
    try:
        trace = open_trace(path)
    except TraceError as error:
        raise TraceError(f"--replay-routing: {error}") from error
    if not {"weights", "probs"} & set(trace.header.fields):
        raise TraceError(f"--replay-routing: {path} has neither weights nor probs, only which experts ran")
    return trace


def check_fit(trace: Trace, model: str, layers: int, experts: Sequence[int], active: int) -> None:
    """Checks that a trace fits a model. A model with fewer layers than the trace uses the routing of its first layers.

    Args:
        trace: to be replayed.
        model: its name, for the message.
        layers: `L` of the model.
        experts: `E` of each of its MoE layers.
        active: `K`.

    Raises:
        ConfigError: the model has more layers than the trace, or other numbers of experts.
    """
    header = trace.header
    if layers > header.layers or set(experts) != {header.experts} or active != header.active:
        shape = " or ".join(map(str, sorted(set(experts))))
        raise ConfigError(
            f"--replay-routing: {trace.path} routes to {header.active} of {header.experts} experts in {header.layers} "
            f"layers, {model} to {active} of {shape} in {layers}; give a trace of its shape"
        )


def replay_routing(model: Any, trace: str | Path | Trace) -> ForcedRouting:
    """Forces the routing of `trace` onto `model` from its next forward pass on, beginning with the first request.

    The policy gets the recorded gates, and the recorded lookahead if there is any. What it learns is not saved.

    Args:
        model: from `finemoe.load` (with `map_store="none"` if its policy learns), or transformers' own.
        trace: a file, or an open trace.

    Raises:
        TraceError: the trace can't be read or replayed.
        ConfigError: it does not fit the model, or lacks lookahead that the policy needs.
        UnsupportedModelError: the model's layers share experts.
    """
    return ForcedRouting(model, trace if isinstance(trace, Trace) else open_routing(trace))


class ForcedRouting:
    """Recorded routing, attached to a model; implements `ForcedGates`. See `replay_routing`.

    A request is a row of the batch; a pass without a KV cache starts new requests.
    """

    def __init__(self, model: Any, trace: Trace) -> None:
        self.trace = trace
        modules = _experts_modules(model)
        experts = [int(module.num_experts) for module in modules]
        check_fit(trace, type(model).__name__, len(modules), experts, active_experts(model.config))
        self.layers = len(modules)
        self.lookahead = trace.header.lookahead
        self.restart()
        if (handle := getattr(model, "finemoe", None)) is not None:
            handle.force_gates(self, str(trace.path))
        self._hooks = [
            model.register_forward_pre_hook(self._on_pass, with_kwargs=True, prepend=True),
            model.get_input_embeddings().register_forward_hook(self._on_embedding, prepend=True),
        ]
        for layer, module in enumerate(modules):
            hook = self._forcing_hook(layer, module)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def restart(self) -> None:
        """Starts again with the trace's first request, from the model's next request on."""
        self._unused = iter(range(len(self.trace)))
        self._sequences: list[RowSequence] = []  # of the running requests
        # of the pass that runs
        self._rows: Tensor | None = None  # [T]
        self._first = True  # without a KV cache: its requests are new
        self._mask: Tensor | None = None

    def gates(self, layer: int) -> Tensor | None:
        """Recorded distributions `[T, E]` of a layer in the pass that runs; `None` if they were not recorded."""
        return self._floats("probs", np.s_[:, layer])

    def ahead(self, layer: int, distance: int) -> Tensor | None:
        """Recorded lookahead `[T, E]` from `layer` to the layer `distance` after it; `None` if there is none."""
        if layer + distance >= self.layers or distance > self.lookahead:
            return None
        return self._floats("lookahead", np.s_[:, distance - 1, layer])

    def _floats(self, name: str, index: tuple[Any, ...]) -> Tensor | None:
        column = self.trace.column(name)
        if column is None or self._rows is None:
            return None
        return torch.from_numpy(column[index][self._rows.numpy()].astype(np.float32))

    def _on_pass(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._mask, self._first = read_pass(module, arguments, keywords)
        self._rows = None

    def _on_embedding(self, _module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._rows is not None or not arguments or output.dim() != 3:
            return  # some models embed more than once before their first layer
        batch, length = output.shape[:2]
        mask = np.ones((batch, length), bool)
        if self._mask is not None and self._mask[:, -length:].shape == mask.shape:
            mask = self._mask[:, -length:].bool().cpu().numpy()
        if self._first or len(self._sequences) != batch:
            self._sequences = [RowSequence(self.trace, self._unused) for _ in range(batch)]
        rows = np.zeros((batch, length), np.int64)
        for row, sequence in enumerate(self._sequences):
            if length == 1 and not self._first:
                rows[row] = sequence.next_decode()
                continue
            kept = np.flatnonzero(mask[row])
            prompt_rows = sequence.next_prompt(len(kept))
            rows[row] = prompt_rows[0] if len(prompt_rows) else 0  # padding repeats a row: it needs no other experts
            rows[row, kept] = prompt_rows
        self._rows = torch.from_numpy(rows.reshape(-1))
        self._read_routing()

    def _read_routing(self) -> None:
        """Reads executed experts and weights `[T, L, K]` of the pass, and renormalises the weights.

        If a token executed fewer than `K` experts, its first one is repeated with weight 0, which loads no other.
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

    def _forcing_hook(self, layer: int, module: nn.Module) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        signature = inspect.signature(type(module).forward)
        _, _, index, weights = list(signature.parameters)[:4]

        def force(
            module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            bound = signature.bind(module, *arguments, **keywords)
            given = bound.arguments
            if self._rows is None or given[index].shape[0] != len(self._rows):
                raise UnsupportedModelError("recorded routing can be replayed only if a layer gets all tokens at once")
            given[index] = self._ids[:, layer].to(given[index])
            given[weights] = self._weights[:, layer].to(given[weights])
            return bound.args[1:], bound.kwargs

        return force


class RowSequence:
    """The token rows of a trace that one running request gets, prompt first, then one for each decoded token.

    A longer prompt than recorded repeats the recorded one; without a recorded prompt, decoded tokens are used from the
    last to the first. A longer answer than recorded goes on with the decoded tokens of the next request.

    Args:
        trace: to be replayed.
        unused: indices of recorded requests that no running request has used yet; shared by all of them.
    """

    def __init__(self, trace: Trace, unused: Iterator[int]) -> None:
        self._trace = trace
        self._unused = unused
        self._prompt, self._decoded = self._next_request()
        self._prompt_tokens = 0  # given out
        self._decoded_tokens = 0  # given out

    def next_prompt(self, tokens: int) -> Rows:
        """Rows `[tokens]` of the prompt's next tokens."""
        at = np.arange(self._prompt_tokens, self._prompt_tokens + tokens)
        self._prompt_tokens += tokens
        rows: Rows = self._prompt[at % len(self._prompt)] if len(self._prompt) else self._decoded[-1 - at % len(self)]
        return rows

    def next_decode(self) -> Rows:
        """The row `[1]` of the next decoded token.

        Raises:
            TraceError: all recorded requests are used up.
        """
        while self._decoded_tokens == len(self):
            self._decoded_tokens = 0
            _, self._decoded = self._next_request()
        self._decoded_tokens += 1
        return self._decoded[self._decoded_tokens - 1 : self._decoded_tokens]

    def __len__(self) -> int:
        """Decoded tokens of the recorded request that is being replayed."""
        return len(self._decoded)

    def _next_request(self) -> tuple[Rows, Rows]:
        index = next(self._unused, None)
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


def _experts_modules(model: Any) -> list[Any]:
    """The experts module of each MoE layer, in order, offloaded or not."""
    if hasattr(model, "finemoe"):
        layers = {id(module): module.__dict__[HANDLE].layer for module in model.modules() if HANDLE in module.__dict__}
        modules = sorted((m for m in model.modules() if id(m) in layers), key=lambda m: layers[id(m)])
        shared = any(layers[id(one)] == layers[id(other)] for one, other in pairwise(modules))
    else:
        found = find_experts(model)
        modules, shared = [module for _, module in found], any(described.same_as for described, _ in found)
    if shared:
        raise UnsupportedModelError(
            f"{type(model).__name__} shares experts between layers: its routing can't be replayed"
        )
    return modules
