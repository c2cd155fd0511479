"""What the simulator is to be given to mimic a row: times of the running engine, and their ratios."""

from __future__ import annotations

from collections.abc import Sequence

from finemoe.bench.subject import Phase

MIMIC_NAMES: tuple[str, ...] = (
    "layer_s", "expert_s", "outside_s", "link_ratio", "before_gate", "gap", "lag", "begin_lag", "prefetch_slowdown",
    "compute_spread", "link_spread", "lag_spread", "tokens_per_unit",
)  # fmt: skip


def mimic(prompts: Sequence[tuple[int, Phase]], decode: Phase, expert_bytes: float) -> dict[str, float | None]:
    """Figures by name; `None` where a model was not offloaded, has a single MoE layer, or answered nothing.

    - `layer_s`: one layer's compute for one token while decoding, as slow as readers and policy beside it make it, but
      without waiting for experts; `before_gate`: the share of it before the gate speaks;
    - `expert_s`: for how long the link is busy to move one urgent expert, while decoding;
    - `outside_s`: from the last MoE layer of a token to the first of the next: head, sampling, embedding;
    - `link_ratio`, `gap`: `expert_s` and `outside_s` in units of `layer_s`;
    - `lag`, `begin_lag`: in the same units, the mean time from a gate, and from an iteration's begin, until what a
      policy beside the model made of it counted; waiting for an earlier thought is not in it;
    - `lag_spread`: the standard deviation of the logarithm of that from a gate;
    - `prefetch_slowdown`: how many times as long it takes to move one that is not urgent;
    - `compute_spread`: the standard deviation of the logarithm of the time from a layer's end to the next gate;
    - `link_spread`: the same of the time to move an expert, of prefetches that nothing else disturbed;
    - `tokens_per_unit`: how many tokens of a prompt a layer computes in the time of one; over all prompts together.

    Args:
        prompts: the tokens and the prefill of each.
        decode: of all requests together.
        expert_bytes: of one expert.
    """
    found: dict[str, float | None] = dict.fromkeys(MIMIC_NAMES)
    before_s, layer_s = decode.befores.mean_s, _layer_s(decode)
    if before_s is None or layer_s is None:
        return found
    found |= {
        "layer_s": layer_s,
        "before_gate": before_s / layer_s,
        "compute_spread": decode.befores.spread,
        "link_spread": decode.passages.spread,
        "lag_spread": decode.gates.spread,
    }
    if (around_s := decode.arounds.mean_s) is not None:  # up to the first gate, so with that layer's part before it
        outside_s = max(0.0, around_s - before_s)
        found |= {"outside_s": outside_s, "gap": outside_s / layer_s}
    found |= _link(decode, expert_bytes, layer_s)
    for name, thoughts in (("lag", decode.gates), ("begin_lag", decode.begins)):
        if thoughts.mean_s is not None:
            found[name] = thoughts.mean_s / layer_s
    timed = [(tokens, own_s) for tokens, prefill in prompts if (own_s := _layer_s(prefill))]
    if prompts_s := sum(own_s for _, own_s in timed):
        found["tokens_per_unit"] = max(1, round(layer_s * sum(tokens for tokens, _ in timed) / prompts_s))
    return found


def _link(decode: Phase, expert_bytes: float, layer_s: float) -> dict[str, float | None]:
    """Without anything urgent, or any prefetch, both are as fast."""
    times = [
        seconds * expert_bytes / moved
        for seconds, moved in ((decode.urgent_s, decode.urgent_bytes), (decode.prefetch_s, decode.prefetch_bytes))
        if moved
    ]
    if not times:
        return {}
    return {
        "expert_s": times[0],
        "link_ratio": times[0] / layer_s,
        "prefetch_slowdown": times[1] / times[0] if len(times) > 1 else None,
    }


def _layer_s(phase: Phase) -> float | None:
    """Compute of one layer, the mean over layers and passes."""
    before_s, after_s = phase.befores.mean_s, phase.afters.mean_s
    return None if before_s is None or after_s is None else before_s + after_s
