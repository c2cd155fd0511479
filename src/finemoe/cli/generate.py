"""`finemoe generate PROMPT`: streams an answer, then prints its speed, hits and memory."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from finemoe.budget import format_bytes
from finemoe.cli.flags import add_flags, read_flags
from finemoe.config import GenerateConfig, LoadConfig, PrefillConfig, ReplayConfig, refuse_undecodable
from finemoe.errors import ConfigError
from finemoe.learned import NO_MAP_STORE
from finemoe.metrics import explain_table
from finemoe.system import unmap_idle_code

if TYPE_CHECKING:
    from finemoe.model.reply import Reply


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    parser.add_argument("prompt", metavar="PROMPT", help="what to ask; - reads it from standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")
    add_flags(parser, LoadConfig)
    add_flags(parser, GenerateConfig)
    add_flags(parser, PrefillConfig)
    add_flags(parser, ReplayConfig)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    load_config, generate_config = read_flags(arguments, LoadConfig), read_flags(arguments, GenerateConfig)
    trace = read_flags(arguments, ReplayConfig).replay_routing
    chunk = read_flags(arguments, PrefillConfig).prefill_chunk
    if trace is not None and chunk is not None:
        raise ConfigError("--prefill-chunk: a recorded prompt was read whole; leave it out with --replay-routing")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    refuse_undecodable(prompt, "PROMPT")
    from finemoe.gguf.locate import refuse_gguf
    from finemoe.model import load_config as load
    from finemoe.model.backend import open_session

    routing = None
    if trace is not None:
        refuse_gguf(load_config.model, "generate --replay-routing")
        from finemoe.trace.forced_routing import open_routing, replay_routing

        routing = open_routing(trace)
        if load_config.map_store is None:
            load_config = replace(load_config, map_store=NO_MAP_STORE)  # forced routing teaches nothing

    def show(text: str) -> None:
        arguments.interrupts.check()
        if not arguments.json:
            print(text, end="", flush=True)

    with load(load_config) as model:
        if routing is not None:
            replay_routing(model, routing)
        session = open_session(model)
        unmap_idle_code()
        arguments.interrupts.check()
        if arguments.json:
            reply = session.reply(prompt, generate_config, show, prefill_chunk=chunk)
            print(json.dumps(reply.as_dict()))
        else:
            reply = session.reply(prompt, generate_config, show, prefill_chunk=chunk, progress=sys.stderr.isatty())
            print(flush=True)
            print(summary(reply), file=sys.stderr)
    return 0


def warn_if_lossy(config: LoadConfig) -> None:
    """Warns on standard error if experts are quantized below the checkpoint's precision."""
    if config.lossy:
        print(_lossy(config.expert_dtype), file=sys.stderr)


def _lossy(expert_dtype: str) -> str:
    return f"LOSSY: experts are kept as {expert_dtype}, answers are not the checkpoint's own (--expert-dtype)"


def summary(reply: Reply) -> str:
    """Speed, expert hits and I/O of an answer in three lines; with `--explain`, its table."""
    stats = reply.stats
    count = len(reply.token_ids)
    tokens = f"{count} tokens at {reply.tok_s:.2f} tok/s; first after {reply.ttft_s:.2f} s"
    tokens = f"{tokens}, then {reply.tpot_s * 1000:.0f} ms each" if count > 1 else f"1 token after {reply.ttft_s:.2f} s"
    on_gpu = stats.device != "cpu"
    where = f"on {stats.device}" if on_gpu else "in memory"
    experts = (
        f"experts: {stats.slots} of {stats.experts} {where} ({format_bytes(stats.expert_memory_bytes)} of "
        f"{format_bytes(stats.expert_bytes)}), policy {stats.policy}: {stats.hit_rate:.1%} hits, "
        f"{stats.late_rate:.1%} late, {stats.miss_rate:.1%} misses"
    )
    if stats.precision is not None:
        experts += f"; {stats.prefetched} prefetched, {stats.precision:.1%} of them used"
    if stats.paused:
        experts += f"; prefetching paused for {stats.paused} tokens, as it did not pay"
    if stats.lossy:
        experts += f"\n{_lossy(stats.expert_dtype)}"
    held = stats.link_bandwidth_bytes_s
    how = f"{stats.io} I/O" if held is None else f"{stats.io} I/O, link throttled to {format_bytes(held)}/s"
    moved = f"copied {format_bytes(stats.bytes_read)} to {stats.device}, " if on_gpu else ""
    transfer = (
        f"{moved}read {format_bytes(stats.disk_bytes)} ({how}), waited for it {reply.stall_share:.0%} of the time; "
        f"peak memory {format_bytes(stats.peak_rss_bytes)}"
    )
    replayed = (
        ""
        if stats.replayed_routing is None
        else f"\nrouting replayed from {stats.replayed_routing}: the text is meaningless"
    )
    explained = "" if stats.explained is None else f"\n\n{explain_table(stats.explained)}"
    return f"\n{tokens}\n{experts}\n{transfer}{replayed}{explained}"
