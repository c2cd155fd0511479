"""Has a policy's kernels compiled before the first answer, not during it.

Compiling takes seconds, once on a machine, while what the policy should have said comes late.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

from finemoe.compiled import ready
from finemoe.policy import make_policy, policy_class
from finemoe.types import DECODE, PREFILL, Routed, Step

_LAYERS, _EXPERTS, _WIDTH = 2, 4, 8
_TOKENS = 3  # decoded by each request; what the second does is searched for among what the first did


def rehearse(policy: str, **options: Any) -> None:
    """Runs two short requests through a tiny policy of that name, with events of the same types as the engine's.

    Nothing is done for one that compiles nothing, or is made for models of one shape.

    Args:
        policy: a name of `make_policy`.
        options: of the policy; `jit` keeps what was compiled.
    """
    if not policy_class(policy).compiles or "predictors" in options:
        return
    tiny = make_policy(policy, _LAYERS, _EXPERTS, **options)
    embedding = np.ones(_WIDTH, np.float32)
    gates = np.array([[0.4, 0.3, 0.2, 0.1]], np.float32)
    iterations = [(request, iteration) for request in range(2) for iteration in range(1 + _TOKENS)]
    quiet = True if ready() else None  # None: unless this is a terminal
    for request, iteration in tqdm(iterations, "compiling the policy, once on this machine", disable=quiet):
        phase, tokens = (PREFILL, 2) if iteration == 0 else (DECODE, 1)
        tiny.begin([Step(request, phase, np.ones(tokens, np.int32), embedding)])
        for layer in range(_LAYERS):
            tiny.routed(Routed(layer, (0, 1), gates, gates[None] if layer + 1 < _LAYERS else None))
        tiny.end()
    tiny.begin(())
