"""`finemoe simulate`: replay a recorded trace under modelled links, policy by policy."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finemoe.cli.flags import add_flags, read_flags
from finemoe.errors import ConfigError
from finemoe.sim.config import SimulateConfig
from finemoe.system import refuse_unwritable


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("trace", metavar="TRACE", help="a recorded trace (finemoe record, finemoe trace import)")
    parser.add_argument(
        "--json", nargs="?", const="-", default=None, metavar="OUT", help="write JSON to OUT, or print it and no table"
    )
    parser.add_argument("--plot", default=None, metavar="OUT.png", help="draw it too; needs finemoe[plots]")
    add_flags(parser, SimulateConfig)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    config = read_flags(arguments, SimulateConfig)
    if arguments.plot:
        from finemoe.sim.report import check

        check(Path(arguments.plot))
    if arguments.json not in {None, "-"}:
        refuse_unwritable("--json", Path(arguments.json))
    from tqdm import tqdm

    from finemoe.sim.cost_model import link_ratios
    from finemoe.sim.report import table
    from finemoe.sim.sweep import Cell, count_iterations, run_cells, runnable
    from finemoe.trace import open_trace

    with open_trace(arguments.trace) as trace:
        header = trace.header
    policies, left_out = runnable(config, header)
    for name, reason in left_out.items():
        print(f"finemoe: {name} is left out: {reason}", file=sys.stderr)
    if not policies:
        raise ConfigError("--policy: this trace has not enough for any of them")
    ratios = link_ratios(config)
    if config.hardware:
        print(f"finemoe: {config.shape} on {config.hardware}: link ratio {ratios[0]:.3g}", file=sys.stderr)
    _say_what_is_compiled()
    cells = [Cell(p, share, ratio) for share in config.shares for ratio in ratios for p in policies]
    total = len(cells) * count_iterations(arguments.trace, config)
    with tqdm(total=total, desc="Replaying", unit=" iterations", leave=False, delay=1, disable=None) as bar:

        def progress(iterations: int) -> None:
            bar.update(iterations)
            arguments.interrupts.check()

        found = {Cell(row.policy, row.expert_memory, row.link_ratio): row
                 for row in run_cells(arguments.trace, config, cells, progress)}  # fmt: skip
    rows = [found[cell] for cell in cells]
    document: dict[str, Any] = {
        "trace": arguments.trace,
        "model": header.model,
        "layers": header.layers,
        "experts": header.experts,
        "settings": asdict(config),
        "left_out": left_out,
        "rows": [row.as_dict() for row in rows],
    }
    if arguments.json == "-":
        print(json.dumps(document))
    else:
        print(table(rows))
        if arguments.json:
            _write(Path(arguments.json), json.dumps(document, indent=1) + "\n")
    if arguments.plot:
        from finemoe.sim.report import draw

        draw(rows, f"{header.model}: {header.layers} layers of {header.experts} experts", Path(arguments.plot))
        print(f"drawn to {arguments.plot}", file=sys.stderr)
    return 0


def _say_what_is_compiled() -> None:
    from finemoe.jit import kernels_cached

    if not kernels_cached():
        print("finemoe: compiling what replays, once on this machine: half a minute", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--json: {path} can't be written ({error.strerror or error})") from error
