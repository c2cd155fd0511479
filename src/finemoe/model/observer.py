"""Forward hooks that pass iterations, gate distributions and lookahead of a running model to the engine's policy.

They do not change what the model computes. If a gate can't be tapped, its distribution is approximated by the executed
weights: the selected experts alone, summing to 1. With forced routing, `ForcedGates` replaces the gates.

Shapes: `B` requests of the pass, `S` positions, `T` rows (`B * S`), `K` experts per token, `E` experts of a layer,
`D` hidden size, `n` layers of lookahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from finemoe.engine.engine import Engine
from finemoe.engine.expert_layer import ExpertLayer, ReadGates
from finemoe.model.introspect import read_pass
from finemoe.model.router_hooks import (
    Router,
    Scale,
    detect_linear,
    find_routers,
    infer_scale,
    normalise,
    run_router,
    scores_of,
)
from finemoe.types import DECODE, PREFILL, Step


class ForcedGates(Protocol):
    """Gate distributions of a model whose routing is forced, for the forward pass that runs."""

    lookahead: int  # n: layers ahead for which `ahead` has distributions; 0 without

    def gates(self, layer: int) -> Tensor | None:
        """Distributions `[T, E]` of a layer; `None` if they are not known."""

    def ahead(self, layer: int, distance: int) -> Tensor | None:
        """Distributions `[T, E]`, predicted at `layer` for the layer `distance` after it; `None` if not known."""


class PackedRequest(NamedTuple):
    """One request's tokens in a packed pass: requests follow one another in a single row `[1, T]`."""

    request: int  # from `Observer.new_request`
    phase: int  # PREFILL or DECODE
    tokens: int


class Observer:
    """Observes the forward passes of an offloaded model, from `attach` on.

    A request is a row of the batch. A pass without a KV cache starts new requests; those after it are their next
    iterations. Padding is ignored. A scheduler that packs several requests into one row describes the row (`packed`).

    Args:
        model: the loaded model.
        engine: receives the begin and end of each iteration.
        layers: the expert layers, by the path of their modules.
        lookahead: `n`, for how many layers ahead to run the gates; set to 0 if these can't be run on their own.
    """

    def __init__(self, model: Any, engine: Engine, layers: dict[str, ExpertLayer], lookahead: int = 0) -> None:
        self._embed = model.get_input_embeddings()  # no reference to the model, which this object outlives
        self._engine = engine
        self._layers = list(layers.values())
        self._routers = find_routers(model, list(layers))
        standalone = all(router is not None and router.standalone for router in self._routers)
        self.lookahead = lookahead if standalone else 0
        if self.lookahead:
            self._routers = [router and detect_linear(router, model.dtype) for router in self._routers]
        self.experts = max(layer.layout.experts for layer in self._layers)
        self._request_numbers = itertools.count()
        self._requests: list[int] = []
        self._packed: tuple[PackedRequest, ...] = ()  # of a packed pass
        # of the pass that runs
        self._mask: Tensor | None = None  # [B, S]
        self._first = True  # without a KV cache: its requests are new
        self._running = False  # its iteration has begun and not ended
        self._scores: dict[int, Tensor] = {}  # by layer
        self._ahead: dict[tuple[int, int], Tensor] = {}  # by layer and distance
        self._scale: Scale | None = None
        self._forced: ForcedGates | None = None

    def force_gates(self, gates: ForcedGates) -> None:
        """From now on, shows the policy `gates` instead of the model's own."""
        self._forced = gates
        self.lookahead = min(self.lookahead, gates.lookahead)

    def attach(self, model: Any) -> None:
        """Registers the hooks."""
        model.register_forward_pre_hook(self._on_pass, with_kwargs=True)
        model.register_forward_hook(self._on_end)
        self._embed.register_forward_hook(self._on_embedding)
        for number, (layer, router) in enumerate(zip(self._layers, self._routers, strict=True)):
            layer.read_gates = self._listener(number)
            if router is not None:
                router.module.register_forward_hook(self._on_router(number, router), with_kwargs=True)

    def new_request(self) -> int:
        """A unique number for a request of packed passes."""
        return next(self._request_numbers)

    @contextmanager
    def packed(self, requests: Sequence[PackedRequest]) -> Iterator[None]:
        """The forward pass within the block has the tokens of these requests, in this order, without padding."""
        self._packed = tuple(requests)
        try:
            yield
        finally:
            self._packed = ()

    def _on_pass(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._mask, self._first = read_pass(module, arguments, keywords)
        self._running = False
        self._scores.clear()
        self._ahead.clear()

    def _on_embedding(self, _module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._running or not arguments or output.dim() != 3:
            return
        ids, (batch, length, _) = arguments[0], output.shape
        no_padding = torch.ones(batch, length, device=output.device)
        self._mask = no_padding if self._mask is None else self._mask[:, -length:].to(output.device).float()
        if self._mask.shape != (batch, length):
            self._mask = no_padding
        means = self._mean(output.detach().float()).cpu().numpy()
        ids = ids.cpu()
        if self._packed:
            token_ids = ids[0].split([packed.tokens for packed in self._packed])
            requests = [(packed.request, packed.phase) for packed in self._packed]
        else:
            if self._first or len(self._requests) != batch:
                self._requests = [self.new_request() for _ in range(batch)]
            token_ids = [row[kept] for row, kept in zip(ids, self._mask.bool().cpu(), strict=True)]
            requests = [(request, PREFILL if self._first else DECODE) for request in self._requests]
        self._engine.begin(
            [
                Step(request, phase, tokens.numpy().astype(np.int32), mean)
                for (request, phase), tokens, mean in zip(requests, token_ids, means, strict=True)
            ]
        )
        self._running = self._engine.deciding

    def _on_end(self, *_: Any) -> None:
        if self._running:
            self._running = False
            self._engine.end()

    def _on_router(self, layer: int, router: Router) -> Callable[..., None]:
        def collect(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if not self._running or self._forced is not None:
                return
            self._scores[layer] = scores_of(router, output)
            for distance, later in enumerate(self._routers[layer + 1 : layer + 1 + self.lookahead], 1):
                assert later is not None
                self._ahead[layer, distance] = run_router(later, arguments, keywords)

        return collect

    def _listener(self, layer: int) -> ReadGates:
        def read_gates(ids: Tensor, weights: Tensor) -> Tensor | None:
            """The gates of a layer, then its lookahead: `[B, 1 + n, E]`, or `[1 + n, E]` for a single token.

            Args:
                ids: executed experts `[T, K]`.
                weights: `[T, K]`.
            """
            if not self._running or self._mask is None or ids.shape[0] != self._mask.numel():
                return None
            if (single := self._single_token(layer)) is not None:
                return single
            gates = self._pool(self._distribution(layer, ids, weights))
            ahead = (self._lookahead(layer, distance, ids.device) for distance in range(1, self.lookahead + 1))
            pooled = [torch.zeros_like(gates) if each is None else self._pool(each) for each in ahead]
            return torch.stack([gates, *pooled], 1).float()

        return read_gates

    def _single_token(self, layer: int) -> Tensor | None:
        """Fast path for decoding one request: `[1 + n, E]`, or `None` if the general path is needed.

        The same numbers in two operations instead of eight: this runs for every layer of every token.
        """
        assert self._mask is not None
        scores = self._scores.get(layer)
        if scores is None or self._mask.numel() != 1 or self._scale is None or self._forced is not None:
            return None
        reach = min(self.lookahead, len(self._layers) - 1 - layer)
        rows = [scores, *(self._ahead[layer, distance] for distance in range(1, reach + 1))]
        if any(row.shape != (1, self.experts) for row in rows):
            return None
        gates = normalise(torch.cat(rows) if len(rows) > 1 else scores, self._scale)
        if reach < self.lookahead:  # the last layers have fewer after them
            gates = torch.cat([gates, gates.new_zeros(self.lookahead - reach, self.experts)])
        return gates

    def _lookahead(self, layer: int, distance: int, device: torch.device) -> Tensor | None:
        """`[T, E]`: the gate of layer `layer + distance`, run on the hidden states of `layer`."""
        if self._forced is not None:
            gates = self._forced.ahead(layer, distance)
            gates = None if gates is None else gates.to(device)
        else:
            scores = self._ahead.get((layer, distance))
            gates = None if scores is None else normalise(scores, self._scale or "softmax")
        return gates if gates is not None and gates.shape[-1] == self.experts else None

    def _distribution(self, layer: int, ids: Tensor, weights: Tensor) -> Tensor:
        """`[T, E]`: the gate's distribution, or an approximation from the executed weights."""
        if self._forced is not None and (recorded := self._forced.gates(layer)) is not None:
            return recorded.to(ids.device) / recorded.sum(1, keepdim=True).clamp_min(1e-30).to(ids.device)
        scores = self._scores.get(layer)
        if scores is not None and scores.shape == (ids.shape[0], self.experts):
            if self._scale is None:
                order = weights.argsort(dim=1, descending=True)
                executed = ids.gather(1, order)[:, None], weights.float().gather(1, order)[:, None]
                self._scale, _ = infer_scale(scores.float()[:, None], *executed)
            return normalise(scores, self._scale)
        spread = torch.zeros(ids.shape[0], self.experts + 1, device=ids.device)
        spread.scatter_add_(1, ids.clamp_max(self.experts).long(), weights.float().clamp_min(0))
        spread = spread[:, : self.experts]
        return spread / spread.sum(1, keepdim=True).clamp_min(1e-30)

    def _pool(self, rows: Tensor) -> Tensor:
        """`[T, E]` to `[B, E]`, by `_mean`."""
        assert self._mask is not None
        return self._mean(rows.reshape(*self._mask.shape, rows.shape[-1]))

    def _mean(self, values: Tensor) -> Tensor:
        """`[B, S, X]` to `[B, X]`, over each request's tokens without padding."""
        if self._packed:
            requests = values[0].split([packed.tokens for packed in self._packed])
            return torch.stack([rows.mean(0) for rows in requests])
        assert self._mask is not None
        if self._mask.numel() == 1:  # decoding one request
            return values[:, 0]
        mask = self._mask[:, :, None]
        return (values * mask).sum(1) / mask.sum(1).clamp_min(1)
