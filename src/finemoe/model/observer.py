"""Tells the engine of a running model what policies listen to: iterations, gate distributions, lookahead.

Nothing that the model computes is changed. Where a gate can't be tapped, the executed weights stand in for its
distribution: the selected experts alone, summing to 1. With forced routing, `ForcedGates`
replaces the gates.
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
from finemoe.engine.expert_layer import ExpertLayer, Listen
from finemoe.model.introspect import read_pass
from finemoe.model.router_hooks import Router, Scale, ask, find_routers, normalise, scale_of, scores_of, with_linear
from finemoe.types import DECODE, PREFILL, Step


class ForcedGates(Protocol):
    """What stands in for the gates of a model whose routing is forced. Of the pass that runs, `T` tokens."""

    lookahead: int  # for how many layers ahead it knows

    def gates(self, layer: int) -> Tensor | None:
        """Distributions `[T, E]`; `None` where they are not known."""

    def ahead(self, layer: int, distance: int) -> Tensor | None:
        """Distributions `[T, E]` of the layer `distance` on; `None` where they are not known."""


class PackedRequest(NamedTuple):
    """One request's tokens in a packed pass: requests lie one after the other in a single row `[1, T]`."""

    request: int  # from `Observer.new_request`
    phase: int
    tokens: int


class Observer:
    """Listens to the forward passes of an offloaded model, from `attach` on.

    A request is a row of the batch; its iterations are the passes from one without a past on. Rows of padding count
    for nothing. Where whoever runs the model packs requests into one row, it says what lies where (`packed`).

    Args:
        model: the loaded model.
        engine: is told when an iteration begins and ends.
        layers: the handles of the experts modules, by the path of each module.
        lookahead: for how many layers ahead to ask the gates; 0 where these can't be asked by themselves.
    """

    def __init__(self, model: Any, engine: Engine, layers: dict[str, ExpertLayer], lookahead: int = 0) -> None:
        self._embed = model.get_input_embeddings()  # and not the model: this outlives it
        self._engine = engine
        self._handles = list(layers.values())
        self._routers = find_routers(model, list(layers))
        alone = all(router is not None and router.alone for router in self._routers)
        self.lookahead = lookahead if alone else 0
        if self.lookahead:
            self._routers = [router and with_linear(router, model.dtype) for router in self._routers]
        self.experts = max(handle.layout.experts for handle in self._handles)
        self._numbers = itertools.count()
        self._requests: list[int] = []
        self._pieces: tuple[PackedRequest, ...] = ()  # of a packed pass
        self._mask: Tensor | None = None  # [B, S], of the tokens of the pass
        self._fresh = True  # the pass has no past: its requests are new
        self._running = False
        self._scores: dict[int, Tensor] = {}  # by layer, of the pass
        self._ahead: dict[tuple[int, int], Tensor] = {}  # by layer and distance, of the pass
        self._scale: Scale | None = None
        self._evidence: ForcedGates | None = None

    def force_gates(self, evidence: ForcedGates) -> None:
        """Show this from now on instead of what the model's own gates say."""
        self._evidence = evidence
        self.lookahead = min(self.lookahead, evidence.lookahead)

    def attach(self, model: Any) -> None:
        """Start listening to the model."""
        model.register_forward_pre_hook(self._on_pass, with_kwargs=True)
        model.register_forward_hook(self._on_end)
        self._embed.register_forward_hook(self._on_embedding)
        for layer, (handle, router) in enumerate(zip(self._handles, self._routers, strict=True)):
            handle.listen = self._listener(layer)
            if router is not None:
                router.module.register_forward_hook(self._on_router(layer, router), with_kwargs=True)

    def new_request(self) -> int:
        """A number for a request that comes in packed passes, never given to another."""
        return next(self._numbers)

    @contextmanager
    def packed(self, pieces: Sequence[PackedRequest]) -> Iterator[None]:
        """The pass made within has these pieces, in this order, and no padding."""
        self._pieces = tuple(pieces)
        try:
            yield
        finally:
            self._pieces = ()

    def _on_pass(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._mask, self._fresh = read_pass(module, arguments, keywords)
        self._running = False
        self._scores.clear()
        self._ahead.clear()

    def _on_embedding(self, _module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._running or not arguments or output.dim() != 3:
            return
        ids, (batch, length, _) = arguments[0], output.shape
        everyone = torch.ones(batch, length, device=output.device)
        self._mask = everyone if self._mask is None else self._mask[:, -length:].to(output.device).float()
        if self._mask.shape != (batch, length):
            self._mask = everyone
        means = self._mean(output.detach().float()).cpu().numpy()
        ids = ids.cpu()
        if self._pieces:
            own = ids[0].split([piece.tokens for piece in self._pieces])
            known = [(piece.request, piece.phase) for piece in self._pieces]
        else:
            if self._fresh or len(self._requests) != batch:
                self._requests = [self.new_request() for _ in range(batch)]
            own = [row[kept] for row, kept in zip(ids, self._mask.bool().cpu(), strict=True)]
            known = [(request, PREFILL if self._fresh else DECODE) for request in self._requests]
        self._engine.begin(
            [
                Step(request, phase, tokens.numpy().astype(np.int32), mean)
                for (request, phase), tokens, mean in zip(known, own, means, strict=True)
            ]
        )
        self._running = self._engine.deciding

    def _on_end(self, *_: Any) -> None:
        if self._running:
            self._running = False
            self._engine.end()

    def _on_router(self, layer: int, router: Router) -> Callable[..., None]:
        def collect(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if not self._running or self._evidence is not None:
                return
            self._scores[layer] = scores_of(router, output)
            for distance, later in enumerate(self._routers[layer + 1 : layer + 1 + self.lookahead], 1):
                assert later is not None
                self._ahead[layer, distance] = ask(later, arguments, keywords)

        return collect

    def _listener(self, layer: int) -> Listen:
        def listen(ids: Tensor, weights: Tensor) -> Tensor | None:
            """Gates and, after them, lookahead `[B, 1 + n, E]` of a layer, for executed ids and weights `[T, K]`.

            Of one request, that of one token, it may be `[1 + n, E]`.
            """
            if not self._running or self._mask is None or ids.shape[0] != self._mask.numel():
                return None
            if (told := self._of_one_token(layer)) is not None:
                return told
            gates = self._pool(self._distribution(layer, ids, weights))
            foreseen = (self._foreseen(layer, distance, ids.device) for distance in range(1, self.lookahead + 1))
            pooled = [torch.zeros_like(gates) if each is None else self._pool(each) for each in foreseen]
            return torch.stack([gates, *pooled], 1).float()

        return listen

    def _of_one_token(self, layer: int) -> Tensor | None:
        """`[1 + n, E]`: what a listener says of one token, as in decoding; `None` where only the long way can tell.

        The same as by that way, in two operations instead of eight: it runs beside every layer of every token.
        """
        assert self._mask is not None
        scores = self._scores.get(layer)
        if scores is None or self._mask.numel() != 1 or self._scale is None or self._evidence is not None:
            return None
        asked = min(self.lookahead, len(self._handles) - 1 - layer)
        rows = [scores, *(self._ahead[layer, distance] for distance in range(1, asked + 1))]
        if any(row.shape != (1, self.experts) for row in rows):
            return None
        told = normalise(torch.cat(rows) if len(rows) > 1 else scores, self._scale)
        if asked < self.lookahead:  # the last layers have fewer after them
            told = torch.cat([told, told.new_zeros(self.lookahead - asked, self.experts)])
        return told

    def _foreseen(self, layer: int, distance: int, device: torch.device) -> Tensor | None:
        """`[T, E]`: what the gate `distance` layers on says of this layer's hidden states."""
        if self._evidence is not None:
            foreseen = self._evidence.ahead(layer, distance)
            foreseen = None if foreseen is None else foreseen.to(device)
        else:
            scores = self._ahead.get((layer, distance))
            foreseen = None if scores is None else normalise(scores, self._scale or "softmax")
        return foreseen if foreseen is not None and foreseen.shape[-1] == self.experts else None

    def _distribution(self, layer: int, ids: Tensor, weights: Tensor) -> Tensor:
        """`[T, E]`: the gate's, or what the executed weights say of it."""
        if self._evidence is not None and (recorded := self._evidence.gates(layer)) is not None:
            return recorded.to(ids.device) / recorded.sum(1, keepdim=True).clamp_min(1e-30).to(ids.device)
        scores = self._scores.get(layer)
        if scores is not None and scores.shape == (ids.shape[0], self.experts):
            if self._scale is None:
                order = weights.argsort(dim=1, descending=True)
                own = ids.gather(1, order)[:, None], weights.float().gather(1, order)[:, None]
                self._scale, _ = scale_of(scores.float()[:, None], *own)
            return normalise(scores, self._scale)
        spread = torch.zeros(ids.shape[0], self.experts + 1, device=ids.device)
        spread.scatter_add_(1, ids.clamp_max(self.experts).long(), weights.float().clamp_min(0))
        spread = spread[:, : self.experts]
        return spread / spread.sum(1, keepdim=True).clamp_min(1e-30)

    def _pool(self, rows: Tensor) -> Tensor:
        """`[T, E]` to `[B, E]`, as `_mean`."""
        assert self._mask is not None
        return self._mean(rows.reshape(*self._mask.shape, rows.shape[-1]))

    def _mean(self, values: Tensor) -> Tensor:
        """`[B, S, X]` to `[B, X]`, over the tokens that are no padding; of a packed pass, over each piece."""
        if self._pieces:
            pieces = values[0].split([piece.tokens for piece in self._pieces])
            return torch.stack([piece.mean(0) for piece in pieces])
        assert self._mask is not None
        if self._mask.numel() == 1:  # decoding one request
            return values[:, 0]
        mask = self._mask[:, :, None]
        return (values * mask).sum(1) / mask.sum(1).clamp_min(1)
