"""Connects llama.cpp's evaluation callback to the engine: each layer waits until its experts are resident.

The library asks the callback for every graph node whether it needs the node's result, and calls it again after
computing such a node. At a routing node the runner reads the expert indices, and the engine loads and pins the experts.
The pins are released at the next routing node, when the layer's computation is complete. Blocking in the callback is
safe: ctypes releases the GIL during a pass, so reader and policy threads keep running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from threading import current_thread, main_thread
from typing import Protocol

import numpy as np
import numpy.typing as npt

from finemoe.errors import FinemoeError, InvariantError
from finemoe.gguf.binding import Library
from finemoe.gguf.context import Context, ContextOptions
from finemoe.gguf.gate_reader import GateReader, node_at
from finemoe.gguf.structure import Structure, name_of, read_indices
from finemoe.types import DECODE, PREFILL, Routed, Step

Embed = Callable[[Sequence[int]], npt.NDArray[np.float32] | None]  # tokens -> mean embedding [D]
_MICRO_BATCH = 512  # the library's default


class ExpertEngine(Protocol):
    """The engine interface that the runner uses."""

    deciding: bool  # whether the policy observes this iteration

    def begin(self, steps: Sequence[Step]) -> None:
        """Start an iteration with the running requests' new tokens."""

    def hold(self, event: Routed) -> None:
        """Block until a layer's experts are resident; they stay pinned until `release` or the next `hold`."""

    @property
    def all_resident(self) -> bool:
        """Whether every expert is resident and no eviction can happen."""

    def count_resident(self, layers: int, experts: int) -> None:
        """Count the hits of a pass that ran without `hold` because all experts are resident."""

    def release(self) -> None:
        """Unpin the experts: the layer's computation is complete."""

    def end(self) -> None:
        """Finish the iteration."""

    def clear(self) -> None:
        """Empty the pool."""


def micro_batch_for(slots: int, experts: int, active: int) -> int:
    """The largest micro-batch whose experts always fit in the slots; 0 if not even one token's do.

    Args:
        slots: number of slots, `C`.
        experts: the largest number of experts in any layer, `E`.
        active: experts per token, `K`.
    """
    return _MICRO_BATCH if slots >= experts else min(slots // active, _MICRO_BATCH)


class Runner:
    """Runs forward passes of one sequence, with an engine that loads experts.

    Args:
        library: the loaded library.
        model: handle of the library's model.
        structure: the model's MoE layers.
        engine: loads and pins experts.
        options: settings of forward passes.
    """

    def __init__(
        self, library: Library, model: int, structure: Structure, engine: ExpertEngine, options: ContextOptions
    ) -> None:
        self._library = library
        self._model = model
        self._layers = structure.layers
        self._routing = frozenset(layer.routing for layer in structure.layers)
        self._engine = engine
        self.options = options
        self._context: Context | None = None
        self._error: BaseException | None = None
        self._unwatched = False  # whether the pass runs without callbacks: one token, all experts resident
        self._expected = 0  # index of the layer whose routing must come next
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="finemoe-gguf")
        self.gates: GateReader | None = None  # set if the policy uses gates
        self.embed: Embed | None = None  # set if the policy uses embeddings
        self.tokens: list[int] = []  # tokens in the KV cache

    @property
    def context(self) -> Context:
        """The sequence's context."""
        if self._context is None:
            raise FinemoeError("this model has no context yet, or was closed; load it again")
        return self._context

    def make_room(self, tokens: int) -> None:
        """Make the context at least `tokens` long. Keeps the KV cache where the library can copy it.

        Raises:
            BudgetError: there is not enough memory for the KV cache.
        """
        if self._context is not None and tokens <= self._context.tokens:
            return
        before, state = self._context, b""
        if before is not None:
            tokens = max(tokens, 2 * before.tokens)
            state = before.save() if self.tokens else b""
            before.close()
            self._context = None
        self._context = Context(self._library, self._model, tokens, self.options, self._evaluate)
        if self.tokens and not self._context.restore(state):
            self.tokens.clear()

    def extend(
        self,
        request: int,
        tokens: Sequence[int],
        *,
        logits: bool,
        decoding: bool = False,
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Append new tokens to the sequence and compute them in micro-batches.

        Args:
            request: request id for the policy.
            tokens: token ids.
            logits: whether to compute the last token's logits.
            decoding: whether this is decoding rather than prefill.
            progress: called with the number of tokens after each micro-batch.

        Raises:
            ExpertReadError: an expert can't be read; the sequence is cleared.
            FinemoeError: the library failed.
        """
        size = self.context.micro_batch
        for start in range(0, len(tokens), size):
            piece = list(tokens[start : start + size])
            last = logits and start + size >= len(tokens)
            embedding = None if self.embed is None else self.embed(piece)
            step = Step(request, DECODE if decoding else PREFILL, np.array(piece, np.int32), embedding)
            self._pass(step, piece, logits=last)
            progress(len(piece))

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the last token, `[vocabulary]`; a view, valid until the next pass."""
        return self.context.logits()

    def forget(self) -> None:
        """Clear the sequence and its KV cache."""
        self.tokens.clear()
        if self._context is not None:
            self._context.clear()

    def close(self) -> None:
        """Free the context."""
        self.tokens.clear()
        if self._context is not None:
            self._context.close()
            self._context = None
        self._thread.shutdown()

    def _pass(self, step: Step, tokens: list[int], *, logits: bool) -> None:
        self._error, self._expected = None, 0
        try:
            self._engine.begin((step,))
            self._unwatched = len(tokens) == 1 and self._engine.all_resident
            self._refuse(self._run(tokens, logits=logits), logits=logits)
            self._engine.release()
            if self._unwatched:
                self._engine.count_resident(len(self._layers), sum(layer.active for layer in self._layers))
            self._engine.end()
        except BaseException:
            self.forget()  # the KV cache of an aborted pass is invalid
            self._engine.clear()
            raise
        self.tokens += tokens

    def _refuse(self, status: int, *, logits: bool) -> None:
        """Raises the error of a pass: from a callback, the library's status, or missing routing nodes."""
        if self._error is not None:
            raise self._error
        if status:
            raise FinemoeError(f"llama.cpp failed with status {status}: {self._library.last_error()}")
        if logits and not self._unwatched and self._expected != len(self._layers):
            raise InvariantError(f"{self._expected} of {len(self._layers)} MoE layers reported their routing")

    def _run(self, tokens: list[int], *, logits: bool) -> int:
        """Run the pass off the main thread: there a signal handler could raise inside a callback, before its `try`."""
        run = partial(self.context.run, tokens, len(self.tokens), logits=logits)
        if current_thread() is not main_thread():
            return run()
        future = self._thread.submit(run)
        try:
            return future.result()
        except BaseException as error:
            self._error = self._error or error
            wait((future,))  # the pass aborts at the next routing node
            raise

    def _evaluate(self, address: int, ask: bool) -> bool:  # noqa: FBT001 - llama.cpp's signature
        if self._unwatched:
            return False
        if self._error is not None:
            return ask  # request this node's result, then return False for it: aborts the pass
        try:
            if ask:
                return name_of(address) in self._routing
            self._hold(address)
        except BaseException as error:  # noqa: BLE001 - must not cross C code; raised after the pass
            self._error = error
            return ask
        return True

    def _hold(self, address: int) -> None:
        tensor = node_at(address)
        number = self._expected
        if number == len(self._layers) or self._layers[number].routing != tensor.name:
            raise InvariantError(f"unexpected routing node {tensor.name.decode()}, in the place of layer {number}")
        self._expected += 1
        experts: list[int] = np.unique(read_indices(tensor)).tolist()
        if not experts:
            return
        gates, ahead = None, None
        if self.gates is not None and self._engine.deciding:
            gates, ahead = self.gates.read(number, address)
        self._engine.hold(Routed(number, experts, gates, ahead, self._layers[number].active))
