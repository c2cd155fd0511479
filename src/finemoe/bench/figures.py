"""From what a process measured to the figures that are shown."""

from __future__ import annotations

from statistics import mean, median

from finemoe.bench.subject import Measured

NAMES: tuple[str, ...] = (
    "load_s", "ttft_s", "tpot_s", "tpot_mean_s", "tok_s", "hit_rate", "bytes_per_token", "stall_share",
    "link_utilisation", "prompt_link_utilisation", "dense_bytes", "pool_bytes", "peak_rss_bytes", "overhead_bytes",
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
    }


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`; `None` of nothing."""
    return part / whole if whole else None
