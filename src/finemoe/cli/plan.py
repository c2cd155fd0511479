"""`finemoe plan`: which budgets fit this machine and the speed to expect, from headers alone."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from finemoe.budget import format_bytes, parse_budget
from finemoe.cli.inspect import add_model_flags, describe_model, stored_as

_SHARES = ("10%", "25%", "50%", "75%", "all")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    add_model_flags(parser)
    parser.add_argument(
        "--expert-memory",
        default=",".join(_SHARES),
        help="budgets to compare, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    budgets = [parse_budget(text) for text in arguments.expert_memory.split(",")]
    description = describe_model(arguments)
    from finemoe.sim.speed_forecast import Sizes, forecast, measure

    index = description.expert_index
    sizes = Sizes(
        layers=description.layers,
        active=description.active,
        experts=index.experts,
        least_slots=description.least_slots,
        slot_bytes=index.slot_bytes,
        expert_bytes=index.weight_bytes,
        dense_bytes=description.dense_bytes,
    )
    path = Path(description.name)
    folder = path.parent if path.is_file() else path
    print("measuring this machine's disk and memory ...", file=sys.stderr)
    rates = measure(folder if folder.is_dir() else None)
    shares = [budget.slots(index.slot_bytes, index.experts) / index.experts for budget in budgets]
    rows = [forecast(sizes, rates, share) for share in shares]
    if arguments.json:
        stored = {"expert_dtype": index.stored_dtype, "lossy": description.lossy}
        document = {"model": description.name, **stored, "sizes": asdict(sizes), "rates": asdict(rates)}
        print(json.dumps(document | {"rows": [asdict(row) for row in rows]}))
        return 0
    experts, dense = format_bytes(index.weight_bytes), format_bytes(description.dense_bytes)
    disk, matmul = format_bytes(rates.disk_bytes_s), format_bytes(rates.memory_bytes_s)
    print(f"{description.name}: experts {experts}, stored as {stored_as(description)}; dense {dense}")
    print(f"this machine: {format_bytes(rates.available_bytes)} of memory available")
    print(f"disk {disk}/s, weights through a matmul {matmul}/s")
    print(f"process: {format_bytes(rows[0].process_bytes)} (interpreter, libraries, the default policy and its store)")
    print(f"\n{'experts in memory':>24}  {'total memory':>12}  {'fits':4}  {'tok/s expected':>14}")
    for row in rows:
        held = f"{'*' if row.raised else ''}{row.slots} ({row.share:.0%}), {format_bytes(row.expert_memory_bytes)}"
        speed = f"{row.tok_s_uniform:.2f} - {row.tok_s_local:.2f}"
        fits = "yes" if row.fits else "no"
        print(f"{held:>24}  {format_bytes(row.total_bytes):>12}  {fits:4}  {speed:>14}")
    if any(row.raised for row in rows):
        print("* raised to the smallest budget that loads")
    print(
        "\ntotal memory: experts in memory, the dense part and the process"
        "\ntok/s while decoding: without routing locality, and with gpt-oss-20b's"
    )
    return 0
