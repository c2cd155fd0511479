"""A small learned predictor for each layer, looking a stride ahead. Only inference: training is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.errors import ConfigError
from finemoe.policy.active import Active, likeliest
from finemoe.policy.ahead import Ahead
from finemoe.policy.book import Scores
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
        return np.asarray(1 / (1 + np.exp(-(hidden @ self.outer[layer] + self.outer_bias[layer]).astype(np.float64))))


def faded(mean: Floats, roots: Floats) -> Floats:
    """The running mean of `roots` over the iterations, with one more."""
    return np.asarray(_FADE * mean + (1 - _FADE) * roots, np.float32)


def inputs(before: Floats, now: Floats, layer: int, stride: int, history: int) -> Floats:
    """What is known once `layer` is: `[n, 2, L, E]` -> `[n, (history + 2) * E]`.

    The roots of the gates of the last `history` layers, over the beginning of the iteration; and of the layer a stride
    ahead, those of its last run and their running mean.

    Args:
        before: after the iteration before: the roots of its gates, and their running means; zeros if there was none.
        now: the same after this iteration. Only what is known once `layer` is, is read.
        layer: the last one that has run.
        stride: as of `Predictors`.
        history: as of `Predictors`.
    """
    layers = now.shape[2]

    def latest(kind: int, of: int) -> Floats:
        return (now if of <= layer else before)[:, kind, of]

    target = (layer + stride) % layers
    run = [latest(0, (layer - back) % layers) for back in range(history)]
    return np.concatenate([*run, latest(0, target), latest(1, target)], axis=1, dtype=np.float32)


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

    Raises:
        ConfigError: the predictors are of another model's shape.
    """

    needs = frozenset({"gates", "predictors"})
    substitutes = MappingProxyType({"hidden states": "the gates of earlier layers and iterations"})

    def __init__(
        self, layers: int, experts: int, predictors: Predictors | None = None, active: int | None = None
    ) -> None:
        super().__init__(layers, experts)
        if predictors is not None:
            if (predictors.layers, predictors.experts) != (layers, experts):
                raise ConfigError(
                    f"the predictors are for {predictors.layers} layers of {predictors.experts} experts, "
                    f"the model has {layers} of {experts}; train them for this model"
                )
            self.stride = min(predictors.stride, layers)
        self.predictors = predictors
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
        seen = inputs(self._known, self._known, layer, self.predictors.stride, self.predictors.history)
        target = (layer + self.stride) % self.layers
        self._expected[target] = likeliest(self.predictors.predict(layer, seen), self.active.count)
        for ahead in range(1, self.stride + 1):
            nearer = (layer + ahead) % self.layers
            expected = self._expected[nearer]
            self.anticipate(nearer, np.where(expected > 0, expected + (self.stride - ahead), 0.0))
