"""ProMoE: a small learned predictor per layer, a stride of layers ahead. Inference; `learned.predictors` trains."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.errors import ConfigError
from finemoe.jit import Jit, compiled_as, interpreted, kernel
from finemoe.policy.cache_state import Scores
from finemoe.policy.published.lru_prefetch import LRUPrefetchPolicy
from finemoe.policy.top_k import TopKEstimator, top_k_union
from finemoe.types import Routed, Step

Floats = npt.NDArray[np.float32]

_ONE, _DECAY = np.float32(1), np.float32(0.9)  # of the running mean, per iteration


class Predictors(NamedTuple):
    """Networks with one hidden layer: that of MoE layer l predicts the experts of layer `(l + stride) % L`.

    `p = sigmoid(relu(x @ inner[l] + inner_bias[l]) @ outer[l] + outer_bias[l])`, with the inputs x `[F]` of
    `input_indices`.
    """

    inner: Floats  # [L, F, H]
    inner_bias: Floats  # [L, H]
    outer: Floats  # [L, H, E]
    outer_bias: Floats  # [L, E]
    stride: int  # how many layers ahead
    history: int  # of how many layers the gates are inputs, the current one included

    @property
    def layers(self) -> int:
        return len(self.outer)

    @property
    def experts(self) -> int:
        return int(self.outer.shape[2])


def _predict_probabilities_loop(predictors: Predictors, layer: int, features: Floats) -> Scores:
    inner, outer = predictors.inner[layer], predictors.outer[layer]
    p = np.empty((len(features), outer.shape[1]))
    for b in range(len(features)):
        hidden = predictors.inner_bias[layer].copy()
        for feature in range(len(inner)):
            x = features[b, feature]
            if x != 0:  # most are 0 if only the selected gates were recorded
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


@compiled_as(_predict_probabilities_loop)
def predict_probabilities(predictors: Predictors, layer: int, features: Floats) -> Scores:
    """`[n, E]`: the probability of each expert of the layer a stride ahead of `layer`.

    Args:
        predictors: trained.
        layer: whose predictor to use.
        features: `[n, F]`, its inputs.
    """
    hidden = np.maximum(features @ predictors.inner[layer] + predictors.inner_bias[layer], 0)
    logits = hidden @ predictors.outer[layer] + predictors.outer_bias[layer]
    return np.asarray(1 / (1 + np.exp(-logits, dtype=np.float64)))


@kernel
def update_mean(mean: Floats, roots: Floats) -> Floats:
    """One step of the exponential running mean over iterations: `0.9 * mean + 0.1 * roots`."""
    return _DECAY * mean + (_ONE - _DECAY) * roots


@kernel
def predict(
    predictors: Predictors, indices: npt.NDArray[np.int64], layer: int, gates: Floats, states: Floats, count: int
) -> Scores:
    """`[E]`: the probability that any request needs each expert of the layer a stride ahead of `layer`.

    Args:
        predictors: trained.
        indices: `[L, F]`, where the inputs lie in a flattened state `[2, L, E]`.
        layer: that has just been routed.
        gates: `[B, E]`, of that layer.
        states: `[B, 2, L, E]`, see `input_indices`; the row of `layer` is updated.
        count: how many experts to predict for each request.
    """
    roots = np.sqrt(gates)
    states[:, 0, layer] = roots
    states[:, 1, layer] = update_mean(states[:, 1, layer], roots)
    features = states.reshape(len(gates), -1)[:, indices[layer]]
    return top_k_union(predict_probabilities(predictors, layer, features), count)


def input_indices(layers: int, experts: int, stride: int, history: int) -> npt.NDArray[np.int64]:
    """`[L, F]`: the inputs of each layer's predictor, `F = (history + 2) * E`.

    A state `[2, L, E]` holds the square roots of an iteration's gates, and their running means. The indices are into a
    flattened pair of states `[2, 2, L, E]`: the previous iteration's (zeros for the first) and this one's. The inputs
    of layer l are what is known once l is routed: the roots of the last `history` layers, continued into the previous
    iteration, and of the target layer its latest roots and running means.
    """
    places = np.arange(2 * 2 * layers * experts).reshape(2, 2, layers, experts)
    rows = []
    for layer in range(layers):
        back = [(layer - i) % layers for i in range(history)]
        target = (layer + stride) % layers
        latest = [places[int(of <= layer), 0, of] for of in (*back, target)]
        rows.append(np.concatenate([*latest, places[int(target <= layer), 1, target]]))
    return np.stack(rows)


class ProMoEPolicy(LRUPrefetchPolicy):
    """LRU cache; prefetches the experts that a learned predictor expects a stride of layers ahead.

    Source: ProMoE (Song et al., arXiv 2410.22134): small networks, trained in advance on the model's own runs, predict
    the experts of a later layer early enough to fetch them, nearer layers first. The paper's chunked prefetching, early
    preemption by demand loads, and computing cached experts first are not part of this class: store and engine do all
    three for every policy.

    Deviations and readings:

    - The paper's predictors read the layer's hidden states. A recorded trace has gates only, so these read the gates of
      earlier layers, back into the previous iteration, and of the target layer's last runs (`substitutes`).
    - The stride is 2 layers; the paper leaves it as a parameter. It continues past the last layer, so that the first
      layers of the next token are predicted too, without knowing that token.
    - As many experts as a token activates are prefetched for each request. LRU replaces the paper's own cache.
    - Without predictors this is plain LRU.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        predictors: trained for this model.
        active: K; by default estimated from events.
        jit: compiles the kernels.

    Raises:
        ConfigError: the predictors are for another number of layers or experts.
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
            # one state is enough here: its rows of layers to come still hold the previous iteration's values
            state_size = 2 * layers * experts
            self._indices = input_indices(layers, experts, predictors.stride, predictors.history) % state_size
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
        self.record_use(layer, event.experts)
        self.active.observe(event)
        if self.predictors is None or gates is None or not len(gates) or len(gates) != len(self._requests):
            return
        target = (layer + self.stride) % self.layers
        self._expected[target] = self._predict(
            self.predictors, self._indices, layer, gates, self._states, self.active.count
        )
        for ahead in range(1, self.stride + 1):
            layer_ahead = (layer + ahead) % self.layers
            expected = self._expected[layer_ahead]
            self.prefetch_layer(layer_ahead, np.where(expected > 0, expected + (self.stride - ahead), 0.0))
