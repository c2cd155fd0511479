"""A small learned predictor for each layer, looking a stride ahead. Only inference: training is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.errors import ConfigError
from finemoe.jit import Jit, compiled_as, interpreted, kernel
from finemoe.policy.cache_state import Scores
from finemoe.policy.published.lru_prefetch import LayerPrefetch
from finemoe.policy.top_k import TopKEstimator, likeliest
from finemoe.types import Routed, Step

Floats = npt.NDArray[np.float32]

_ONE, _FADE = np.float32(1), np.float32(0.9)  # what an iteration weighs in the running mean one iteration later


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


def _chances_loop(predictors: Predictors, layer: int, seen: Floats) -> Scores:
    inner, outer = predictors.inner[layer], predictors.outer[layer]
    p = np.empty((len(seen), outer.shape[1]))
    for b in range(len(seen)):
        hidden = predictors.inner_bias[layer].copy()
        for feature in range(len(inner)):
            x = seen[b, feature]
            if x != 0:  # most are, where only the selected gates were recorded
                for h in range(len(hidden)):
                    hidden[h] += x * inner[feature, h]
        logits = predictors.outer_bias[layer].copy()
        for h in range(len(hidden)):
            if hidden[h] > 0:
                for expert in range(len(logits)):
                    logits[expert] += hidden[h] * outer[h, expert]
        for expert in range(len(logits)):
            p[b, expert] = 1 / (1 + np.exp(-np.float64(logits[expert])))
    return p


@compiled_as(_chances_loop)
def chances(predictors: Predictors, layer: int, seen: Floats) -> Scores:
    """The inputs of a layer's predictor `[n, F]` -> `[n, E]`, the chance of each expert of the layer a stride ahead."""
    hidden = np.maximum(seen @ predictors.inner[layer] + predictors.inner_bias[layer], 0)
    logits = hidden @ predictors.outer[layer] + predictors.outer_bias[layer]
    return np.asarray(1 / (1 + np.exp(-logits, dtype=np.float64)))


@kernel
def faded(mean: Floats, roots: Floats) -> Floats:
    """The running mean of `roots` over the iterations, with one more."""
    return _FADE * mean + (_ONE - _FADE) * roots


@kernel
def predict(
    predictors: Predictors, places: npt.NDArray[np.int64], layer: int, gates: Floats, states: Floats, count: int
) -> Scores:
    """Takes in the gates `[B, E]` of `layer`. Returns what the requests will need `[E]` of the layer a stride ahead.

    Args:
        predictors: trained.
        places: `[L, F]`, where the inputs lie in a flattened state.
        layer: that is known now.
        gates: of that layer.
        states: `[B, 2, L, E]`, see `inputs`; is brought up to date.
        count: how many experts to expect for each request.
    """
    roots = np.sqrt(gates)
    states[:, 0, layer] = roots
    states[:, 1, layer] = faded(states[:, 1, layer], roots)
    seen = states.reshape(len(gates), -1)[:, places[layer]]
    return likeliest(chances(predictors, layer, seen), count)


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


class ProMoEPolicy(LayerPrefetch):
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
        jit: compiles the networks and the bookkeeping.

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
        self._predict = jit(predict)
        self.active = TopKEstimator(active)
        self._requests: list[int] = []
        self._states: Floats = np.zeros((0, 2, layers, experts), np.float32)
        self._expected = np.zeros((layers, experts))

    def begin(self, steps: Sequence[Step]) -> None:
        requests = [step.request for step in steps]
        if requests == self._requests:
            return
        states = np.zeros((len(requests), 2, self.layers, self.experts), np.float32)
        for b, request in enumerate(requests):
            if request in self._requests:
                states[b] = self._states[self._requests.index(request)]
        self._requests, self._states = requests, states

    def routed(self, event: Routed) -> None:
        layer, gates = event.layer, event.gates
        self.used(layer, event.experts)
        self.active.hear(event)
        if self.predictors is None or gates is None or not len(gates) or len(gates) != len(self._requests):
            return
        target = (layer + self.stride) % self.layers
        self._expected[target] = self._predict(
            self.predictors, self._inputs, layer, gates, self._states, self.active.count
        )
        for ahead in range(1, self.stride + 1):
            nearer = (layer + ahead) % self.layers
            expected = self._expected[nearer]
            self.anticipate(nearer, np.where(expected > 0, expected + (self.stride - ahead), 0.0))
