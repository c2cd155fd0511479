"""`finemoe bench`: measure a model against transformers, or (`finemoe bench serve`) the server under load."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from finemoe.bench.config import BenchConfig
from finemoe.bench.serve.config import (
    ConcurrencyConfig,
    LoadTestConfig,
    OverheadConfig,
    ScenarioConfig,
    SoakConfig,
)
from finemoe.cli.flags import Parser, add_flags, read_flags
from finemoe.cli.serve import refuse_missing_extra
from finemoe.errors import ConfigError
from finemoe.system import refuse_unwritable

SCENARIOS: dict[str, tuple[str, type[ScenarioConfig]]] = {  # of `finemoe bench serve`
    "load": ("a published trace's arrivals, policy by policy: latencies, goodput, hit rate", LoadTestConfig),
    "concurrency": ("throughput by the number of clients, with and without batching", ConcurrencyConfig),
    "soak": ("memory over time under mixed requests, and what is left afterwards", SoakConfig),
    "overhead": ("time per token by HTTP, by the worker and by generate", OverheadConfig),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags, and `serve` with its scenarios."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")
    add_flags(parser, BenchConfig)
    about = "measure the server under requests (finemoe bench serve --help)"
    commands = parser.add_subparsers(dest="benchmark", metavar="serve", parser_class=Parser, title="other benchmarks")
    serve = commands.add_parser("serve", help=about, description="Measure finemoe serve. One of:")
    scenarios = serve.add_subparsers(dest="scenario", metavar="SCENARIO", parser_class=Parser, required=True)
    for name, (summary, config) in SCENARIOS.items():
        scenario = scenarios.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        scenario.add_argument(
            "--json", nargs="?", const="-", default=None, dest="out", metavar="OUT",
            help="write everything measured to OUT as it comes, or print it and no table",
        )  # fmt: skip
        add_flags(scenario, config)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status: 1 if a row, or the soak, failed."""
    if arguments.benchmark == "serve":
        return _run_serve(arguments)
    config = read_flags(arguments, BenchConfig)
    from finemoe.bench.run import run_bench
    from finemoe.bench.table import render

    report = run_bench(config, lambda line: print(line, file=sys.stderr))
    print(json.dumps(report.as_dict()) if arguments.json else render(report))
    return 1 if report.failed else 0


def _run_serve(arguments: argparse.Namespace) -> int:
    _, kind = SCENARIOS[arguments.scenario]
    _refuse_flags_of_bench(arguments, kind)
    config: ScenarioConfig = read_flags(arguments, kind)
    out = None if arguments.out in {None, "-"} else Path(arguments.out)
    if out is not None:
        refuse_unwritable("--json", out)
    _refuse_missing_client()
    from finemoe.bench.serve.concurrency import Concurrency
    from finemoe.bench.serve.load import LoadTest
    from finemoe.bench.serve.overhead import Overhead
    from finemoe.bench.serve.scenario import Scenario, terminated_like_ctrl_c
    from finemoe.bench.serve.soak import Soak

    scenario: Scenario
    match config:
        case LoadTestConfig():
            scenario = LoadTest(config, out)
        case ConcurrencyConfig():
            scenario = Concurrency(config, out)
        case SoakConfig():
            scenario = Soak(config, out)
        case OverheadConfig():
            scenario = Overhead(config, out)
    try:
        with terminated_like_ctrl_c():
            scenario.run()
    finally:  # after an error or Ctrl-C too: hours of measurements may stand in it
        scenario.write()
        if scenario.measured:
            print(scenario.as_json() if arguments.out == "-" else scenario.table())
    return 1 if scenario.failed else 0


def _refuse_flags_of_bench(arguments: argparse.Namespace, kind: type) -> None:
    """Raises `ConfigError` for a flag in front of `serve` that would be ignored."""
    known = {field.name for field in fields(kind)}
    given = [field.name for field in fields(BenchConfig) if field.name in arguments and field.name not in known]
    if arguments.json:
        given.append("json")
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{flag}: has no effect in front of serve; see finemoe bench serve {arguments.scenario}")


def _refuse_missing_client() -> None:
    """Raises `ConfigError` where the server's or the client's libraries are not installed."""
    refuse_missing_extra()
    from importlib.util import find_spec

    if find_spec("openai") is None:
        raise ConfigError("bench serve: openai, its client, is not installed; pip install openai")
