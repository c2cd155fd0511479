"""`finemoe bench`: measure, beside transformers, in one run."""

from __future__ import annotations

import argparse
import json
import sys

from finemoe.bench.config import BenchConfig
from finemoe.cli.flags import add_flags, read_flags


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")
    add_flags(parser, BenchConfig)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status: 1 if a row failed."""
    config = read_flags(arguments, BenchConfig)
    from finemoe.bench.run import run_bench
    from finemoe.bench.table import render

    report = run_bench(config, lambda line: print(line, file=sys.stderr))
    print(json.dumps(report.as_dict()) if arguments.json else render(report))
    return 1 if report.failed else 0
