"""From what a process measured to the figures that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median

import numpy as np

from finemoe.bench.answers import Answered
from finemoe.bench.mimic import MIMIC_NAMES, mimic
from finemoe.bench.subject import COUNTED, Measured, Phase

NAMES: tuple[str, ...] = (
    "load_s", "ttft_s", "tpot_s", "tpot_mean_s", "tok_s", "hit_rate", "bytes_per_token", "stall_share",
    "link_utilisation", "prompt_link_utilisation", "dense_bytes", "pool_bytes", "peak_rss_bytes", "overhead_bytes",
    "perplexity",
)  # fmt: skip
ANSWER_NAMES: tuple[str, ...] = (
    "load_s", "ttft_s", "ttft_p50_s", "ttft_p95_s", "tpot_s", "tpot_p50_s", "tpot_p95_s", "tok_s",
    "prefill_hit_rate", "prefill_late_rate", "prefill_miss_rate", "prefill_stall_share",
    "decode_hit_rate", "decode_late_rate", "decode_miss_rate", "decode_stall_share", "stall_share",
    "bytes_read", "bytes_per_token", "prefetched", "precision", "wasted",
    "dense_bytes", "pool_bytes", "peak_rss_bytes", "perplexity", *MIMIC_NAMES,
)  # fmt: skip
LEAST_STALL_S = 0.01  # below, a share of the stall is noise


def derive(measured: Measured, link_bytes_s: float) -> dict[str, float | None]:
    """All figures by name; `None` where one has no meaning. Those without `prompt` or `ttft` are of decoding.

    - `ttft_s`: of a prompt, cold; `tpot_s`, `tpot_mean_s`: median and mean of a later token's time;
    - `bytes_per_token`: read from storage, as the kernel counts, else as the engine does;
    - `stall_share`: of the decoding time;
    - `link_utilisation`: bytes moved while stalled / (stall x raw bandwidth), bandwidth in bytes/s, measured between
      the tokens where the subject allows it, else before and after the row (`link_bytes_s`);
    - `prompt_link_utilisation`: bytes of the cold prompt / (its whole time x raw bandwidth), compute included;
    - `overhead_bytes`: peak resident set beyond dense weights and pool.
    """
    prompt, decode = measured.prompt, measured.decode
    engine = measured.pool_bytes > 0
    read_bytes = decode.bytes_read if decode.disk_bytes is None else decode.disk_bytes
    decode_bytes_s, prompt_bytes_s = (phase.link_bytes_s or link_bytes_s for phase in (decode, prompt))
    stalled = engine and decode.stall_s >= LEAST_STALL_S
    return {
        "load_s": measured.load_s,
        "ttft_s": prompt.total_s,
        "tpot_s": median(decode.seconds),
        "tpot_mean_s": mean(decode.seconds),
        "tok_s": ratio(len(decode.seconds), decode.total_s),
        "hit_rate": ratio(decode.hits, decode.accesses),
        "bytes_per_token": read_bytes / len(decode.seconds),
        "stall_share": ratio(decode.stall_s, decode.total_s) if engine else None,
        "link_utilisation": ratio(decode.stalled_bytes, decode.stall_s * decode_bytes_s) if stalled else None,
        "prompt_link_utilisation": ratio(prompt.bytes_read, prompt.total_s * prompt_bytes_s) if engine else None,
        "dense_bytes": measured.dense_bytes,
        "pool_bytes": measured.pool_bytes,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "overhead_bytes": measured.peak_rss_bytes - measured.weight_bytes,
        "perplexity": measured.perplexity,
    }


def derive_answers(answered: Answered) -> dict[str, float | None]:
    """All figures of answers to real prompts by name; `None` where one has no meaning.

    - `ttft_s`, `tpot_s`: means over requests, and their 50th and 95th percentiles; a request's TPOT is the mean time
      of its tokens after the first, and one of a single token has none;
    - `prefill_`, `decode_`: of the first tokens, and of all that follow;
    - `stall_share`: of the time of either, or of both;
    - `bytes_per_token`: read while decoding; `bytes_read`: in all;
    - `prefetched`, `wasted`: experts; `precision`: prefetched and needed, of all prefetched;
    - what a simulation of the same accesses is to be given: see `mimic`.
    """
    answers = answered.answers
    ttft_s = [answer.prompt.total_s for answer in answers]
    tpot_s = [mean(answer.decode.seconds) for answer in answers if answer.decode.seconds]
    prefill, decode = together([a.prompt for a in answers]), together([a.decode for a in answers])
    both = together([prefill, decode])
    engine = answered.pool_bytes > 0
    figures: dict[str, float | None] = {
        "load_s": answered.load_s,
        "ttft_s": mean(ttft_s),
        "ttft_p50_s": float(np.percentile(ttft_s, 50)),
        "ttft_p95_s": float(np.percentile(ttft_s, 95)),
        "tpot_s": mean(tpot_s) if tpot_s else None,
        "tpot_p50_s": float(np.percentile(tpot_s, 50)) if tpot_s else None,
        "tpot_p95_s": float(np.percentile(tpot_s, 95)) if tpot_s else None,
        "tok_s": ratio(sum(map(len, answered.tokens)), both.total_s),
        "stall_share": ratio(both.stall_s, both.total_s) if engine else None,
        "bytes_read": both.bytes_read if engine else None,
        "bytes_per_token": ratio(decode.bytes_read, len(decode.seconds)) if engine else None,
        "prefetched": answered.prefetched if engine else None,
        "precision": ratio(answered.prefetched_used, answered.prefetched),
        "wasted": answered.wasted if engine else None,
        "dense_bytes": answered.dense_bytes,
        "pool_bytes": answered.pool_bytes,
        "peak_rss_bytes": answered.peak_rss_bytes,
        "perplexity": answered.perplexity,
    }
    for name, phase in (("prefill", prefill), ("decode", decode)):
        figures[f"{name}_hit_rate"] = ratio(phase.hits, phase.accesses)
        figures[f"{name}_late_rate"] = ratio(phase.late, phase.accesses)
        figures[f"{name}_miss_rate"] = ratio(phase.accesses - phase.hits - phase.late, phase.accesses)
        figures[f"{name}_stall_share"] = ratio(phase.stall_s, phase.total_s) if engine else None
    prompts = [(answer.prompt_tokens, answer.prompt) for answer in answers]
    return figures | mimic(prompts, decode, answered.expert_bytes)


def together(phases: Sequence[Phase]) -> Phase:
    """Steps and counts of several phases as of one."""
    seconds = tuple(s for phase in phases for s in phase.seconds)
    counted = {name: sum((getattr(phase, name) for phase in phases), getattr(Phase, name)) for name in COUNTED}
    return Phase(seconds, disk_bytes=None, **counted)


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`; `None` of nothing."""
    return part / whole if whole else None
