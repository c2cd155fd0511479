"""The callback between the library and the engine: once a layer's routing is known, it waits for that layer's experts.

The library asks of every node of a pass whether its result is wanted, and stops after those that are. At a routing node
the indices are read, the engine brings the experts in and pins them, and the library goes on; the pins are released at
the next layer's, when all that was computed with these experts is done. Waiting there is safe: ctypes has released the
GIL for the pass, so readers and a policy's thread go on.
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

Embed = Callable[[Sequence[int]], npt.NDArray[np.float32] | None]  # tokens to the mean of their embeddings [D]
_MICRO_BATCH = 512  # the library's own default


class ExpertEngine(Protocol):
    """What the runner needs of an engine."""

    deciding: bool  # whether the policy observes this iteration

    def begin(self, steps: Sequence[Step]) -> None:
        """An iteration begins: what the running requests bring to it."""

    def hold(self, event: Routed) -> None:
        """Return once all of a layer's experts are resident; they stay so until `release`, or the next `hold`."""

    @property
    def all_resident(self) -> bool:
        """Whether every expert is resident, and stays so."""

    def count_resident(self, layers: int, experts: int) -> None:
        """Count a pass that ran without `hold`, as all experts are resident."""

    def release(self) -> None:
        """Nothing is computed with the layer's experts any more."""

    def end(self) -> None:
        """The iteration is over."""

    def clear(self) -> None:
        """Empty the pool."""


def micro_batch_for(slots: int, experts: int, active: int) -> int:
    """How many tokens may run through a layer at once, so that their experts fit in the slots; 0: not one.

    Args:
        slots: `C`.
        experts: the largest `E` of any layer.
        active: `K`.
    """
    return _MICRO_BATCH if slots >= experts else min(slots // active, _MICRO_BATCH)


class Runner:
    """Runs passes of one sequence under an engine.

    Args:
        library: the loaded library.
        model: its model.
        structure: the model's MoE layers.
        engine: brings experts in.
        options: how passes are computed.
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
        self._unwatched = False  # whether the pass runs by itself: a token's, where every expert is resident
        self._expected = 0  # the layer that must be the next to route
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="finemoe-gguf")
        self.gates: GateReader | None = None  # where the policy listens to gates
        self.embed: Embed | None = None  # and to embeddings
        self.tokens: list[int] = []  # of the sequence, as far as it is computed

    @property
    def context(self) -> Context:
        """The sequence's."""
        if self._context is None:
            raise FinemoeError("this model has no context yet, or was closed; load it again")
        return self._context

    def make_room(self, tokens: int) -> None:
        """Provide for a sequence of so many tokens; what is computed of it stays.

        Raises:
            BudgetError: there is not enough memory for its keys and values.
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
        """Compute new tokens at the end of the sequence, a micro-batch at a time.

        Args:
            request: identifies the running request to the policy.
            tokens: their ids.
            logits: whether the last one's are wanted.
            decoding: whether this is an answer's token, not a prompt's.
            progress: called with the number of tokens after each micro-batch.

        Raises:
            ExpertReadError: an expert can't be read; the sequence is forgotten.
            FinemoeError: the library has failed.
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
        """Of the last token, `[vocabulary]`; a view, valid until the next pass."""
        return self.context.logits()

    def forget(self) -> None:
        """Begin a new sequence."""
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
            self.forget()  # keys and values of a broken pass are no good
            self._engine.clear()
            raise
        self.tokens += tokens

    def _refuse(self, status: int, *, logits: bool) -> None:
        """Raises what went wrong within a pass, by the library's status or unseen by it."""
        if self._error is not None:
            raise self._error
        if status:
            raise FinemoeError(f"the library has failed with status {status}: {self._library.last_error()}")
        if logits and not self._unwatched and self._expected != len(self._layers):
            raise InvariantError(f"{self._expected} of {len(self._layers)} MoE layers reported their routing")

    def _run(self, tokens: list[int], *, logits: bool) -> int:
        """The pass, never on the main thread: there a signal's handler may raise before a callback's first line."""
        run = partial(self.context.run, tokens, len(self.tokens), logits=logits)
        if current_thread() is not main_thread():
            return run()
        under_way = self._thread.submit(run)
        try:
            return under_way.result()
        except BaseException as error:
            self._error = self._error or error
            wait((under_way,))  # it ends at the next routing node
            raise

    def _evaluate(self, address: int, ask: bool) -> bool:  # noqa: FBT001 - the library's
        if self._unwatched:
            return False
        if self._error is not None:
            return ask  # stop here, and end the pass when called with the result
        try:
            if ask:
                return name_of(address) in self._routing
            self._hold(address)
        except BaseException as error:  # noqa: BLE001 - must not pass through the library; raised once that has returned
            self._error = error
            return ask
        return True

    def _hold(self, address: int) -> None:
        tensor = node_at(address)
        number = self._expected
        if number == len(self._layers) or self._layers[number].routing != tensor.name:
            raise InvariantError(f"{tensor.name.decode()} chose experts out of turn, in the place of layer {number}")
        self._expected += 1
        experts: list[int] = np.unique(read_indices(tensor)).tolist()
        if not experts:
            return
        gates, ahead = None, None
        if self.gates is not None and self._engine.deciding:
            gates, ahead = self.gates.read(number, address)
        self._engine.hold(Routed(number, experts, gates, ahead, self._layers[number].active))
