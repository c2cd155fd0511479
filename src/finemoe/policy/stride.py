"""A small learned predictor for each layer, looking a stride ahead. Only inference: training is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.errors import ConfigError
from finemoe.policy.active import Active, likeliest
from finemoe.policy.ahead import Ahead
from finemoe.policy.book import Scores
from finemoe.policy.kernel import Jit, interpreted
from finemoe.types import Routed, Step

Floats = npt.NDArray[np.float32]

_FADE = np.float32(0.9)  # what an iteration weighs in the running mean one iteration later


class Predictors(NamedTuple):
    """A network of one hidden layer for each MoE layer l, which predicts layer l + stride, counted over the end."""

    inner: Floats  # [L, F, H]
    inner_bias: Floats  # [L, H]
    outer: Floats  # [L, H, E]
    outer_bias: Floats  # [L, E]
    stride: int  # how many layers ahead
    history: int  # how many layers back the inputs reach

    @property
    def layers(self) -> int:
        return len(self.outer)

    @property
    def experts(self) -> int:
        return int(self.outer.shape[2])

    def predict(self, layer: int, inputs: Floats) -> Scores:
        """`[n, F]` -> `[n, E]`, the chance of each expert of the layer a stride ahead."""
        hidden = np.maximum(inputs @ self.inner[layer] + self.inner_bias[layer], 0)
        logits = hidden @ self.outer[layer] + self.outer_bias[layer]
        return np.asarray(1 / (1 + np.exp(-logits, dtype=np.float64)))


def faded(mean: Floats, roots: Floats) -> Floats:
    """The running mean of `roots` over the iterations, with one more."""
    return np.asarray(_FADE * mean + (1 - _FADE) * roots, np.float32)


def inputs(layers: int, experts: int, stride: int, history: int) -> npt.NDArray[np.int64]:
    """`[L, F]`, where each predictor's inputs lie: `F` indices into states `[2, 2, L, E]`, flattened.

    A state `[2, L, E]` has the roots of an iteration's gates, and their running means; a pair of states is that of the
    iteration before (zeros if there was none) and of this one. The inputs are what is known once the predictor's layer
    is: the roots of the last `history` layers, over the beginning of the iteration, and, of the layer a stride ahead,
    those of its last run and their running means.
    """
    places = np.arange(2 * 2 * layers * experts).reshape(2, 2, layers, experts)
    rows = []
    for layer in range(layers):
        back = [(layer - i) % layers for i in range(history)]
        target = (layer + stride) % layers
        latest = [places[int(of <= layer), 0, of] for of in (*back, target)]
        rows.append(np.concatenate([*latest, places[int(target <= layer), 1, target]]))
    return np.stack(rows)


class Stride(Ahead):
    """An LRU cache, and the experts that a learned predictor expects a stride of layers ahead.

    Source: ProMoE (Song et al., arXiv 2410.22134): small networks, trained beforehand on the model's own runs, predict
    the experts of a later layer early enough to fetch them, nearer layers first. Its chunked prefetching, early
    preemption by what turns out to be missing, and running the cached experts first are not a policy's business here:
    the transfer and the engine do all three for every policy.

    Deviations and readings:

    - The paper's predictors read the layer's hidden states. A recorded trace has gates only, so these read the gates
      of the layers before, back into the last iteration, and of the target layer's last runs (`substitutes`).
    - The stride is 2 layers, of which the paper makes a parameter. It runs on over the end of an iteration, so that
      the first layers of the next token are predicted as well, without knowing the token.
    - As many experts as a token activates are fetched for each request. LRU stands in for the paper's own cache.
    - Without predictors this is plain LRU.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        predictors: trained for this model.
        active: K; by default learned from what layers need.
        jit: compiles the bookkeeping; the networks are matrix products as they are.

    Raises:
        ConfigError: the predictors are of another model's shape.
    """

    needs = frozenset({"gates", "predictors"})
    substitutes = MappingProxyType({"hidden states": "the gates of earlier layers and iterations"})

    def __init__(
        self,
        layers: int,
        experts: int,
        predictors: Predictors | None = None,
        active: int | None = None,
        *,
        jit: Jit[Any] = interpreted,
    ) -> None:
        super().__init__(layers, experts, jit=jit)
        if predictors is not None:
            if (predictors.layers, predictors.experts) != (layers, experts):
                raise ConfigError(
                    f"the predictors are for {predictors.layers} layers of {predictors.experts} experts, "
                    f"the model has {layers} of {experts}; train them for this model"
                )
            self.stride = predictors.stride
            one_state = 2 * layers * experts  # its rows of layers to come are still the iteration before's
            self._inputs = inputs(layers, experts, predictors.stride, predictors.history) % one_state
        self.predictors = predictors
        self._likeliest = jit(likeliest)
        self.active = Active(active)
        self._requests: list[int] = []
        self._known: Floats = np.zeros((0, 2, layers, experts), np.float32)
        self._expected = np.zeros((layers, experts))

    def begin(self, steps: Sequence[Step]) -> None:
        requests = [step.request for step in steps]
        if requests == self._requests:
            return
        known = np.zeros((len(requests), 2, self.layers, self.experts), np.float32)
        for b, request in enumerate(requests):
            if request in self._requests:
                known[b] = self._known[self._requests.index(request)]
        self._requests, self._known = requests, known

    def routed(self, event: Routed) -> None:
        layer, gates = event.layer, event.gates
        self.used(layer, event.experts)
        self.active.see(len(event.experts))
        if self.predictors is None or gates is None or not len(gates) or len(gates) != len(self._requests):
            return
        roots = np.sqrt(gates)
        self._known[:, 0, layer] = roots
        self._known[:, 1, layer] = faded(self._known[:, 1, layer], roots)
        seen = self._known.reshape(len(gates), -1).take(self._inputs[layer], axis=1)
        target = (layer + self.stride) % self.layers
        self._expected[target] = self._likeliest(self.predictors.predict(layer, seen), self.active.count)
        for ahead in range(1, self.stride + 1):
            nearer = (layer + ahead) % self.layers
            expected = self._expected[nearer]
            self.anticipate(nearer, np.where(expected > 0, expected + (self.stride - ahead), 0.0))
