"""`finemoe simulate`: replay a recorded trace on a modelled machine, policy by policy."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finemoe.cli.flags import add_flags, read_flags
from finemoe.errors import ConfigError
from finemoe.sim.config import PRESETS, SimulateConfig, read_machine
from finemoe.system import refuse_unwritable


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("trace", metavar="TRACE", help="a recorded trace (finemoe record, finemoe trace import)")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        default=None,
        metavar="OUT",
        help="write JSON to OUT, or print it instead of the table",
    )
    parser.add_argument("--plot", default=None, metavar="OUT.png", help="also draw it; needs finemoe[plots]")
    parser.add_argument(
        "--machine",
        default=None,
        metavar="NAME|FILE",
        help=f"the modelled machine: {', '.join(PRESETS)} (this machine's disk), each with --shape; or a JSON or TOML "
        "file of its timing, such as finemoe bench measures",
    )
    add_flags(parser, SimulateConfig)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    _apply_machine(arguments)
    config = read_flags(arguments, SimulateConfig)
    if arguments.plot:
        from finemoe.sim.report import check_plot

        check_plot(Path(arguments.plot))
    if arguments.json not in {None, "-"}:
        refuse_unwritable("--json", Path(arguments.json))
    from tqdm import tqdm

    from finemoe.sim.report import table
    from finemoe.sim.speed_forecast import link_ratios
    from finemoe.sim.sweep import Cell, count_iterations, run_cells, runnable
    from finemoe.trace import open_trace

    with open_trace(arguments.trace) as trace:
        header = trace.header
    policies, left_out = runnable(config, header)
    for name, reason in left_out.items():
        print(f"finemoe: {name} is left out: {reason}", file=sys.stderr)
    if not policies:
        raise ConfigError("--policy: this trace lacks what each of these policies needs")
    ratios = link_ratios(config)
    if config.hardware:
        print(f"finemoe: {config.shape} on {config.hardware}: link ratio {ratios[0]:.3g}", file=sys.stderr)
    _announce_compilation()
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


def _apply_machine(arguments: argparse.Namespace) -> None:
    """Sets the flags that `--machine` stands for, except those given."""
    if arguments.machine is None:
        return
    settings, given = read_machine(arguments.machine), vars(arguments)
    if "hardware" in given:
        if "hardware" in settings:
            raise ConfigError("--hardware: contradicts --machine, which names the machine; leave one out")
        settings.pop("link_ratio", None)  # the preset gives it
    for name, value in settings.items():
        given.setdefault(name, value)


def _announce_compilation() -> None:
    from finemoe.jit import kernels_cached

    if not kernels_cached():
        print("finemoe: compiling the simulator, once on this machine: half a minute", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--json: {path} can't be written ({error.strerror or error})") from error
