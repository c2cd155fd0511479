"""`finemoe trace`: import, describe, show and measure recorded routing."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finemoe.budget import format_bytes
from finemoe.cli.flags import Parser
from finemoe.errors import ConfigError
from finemoe.system import refuse_unwritable
from finemoe.trace.reader import Trace, open_trace
from finemoe.types import PREFILL


@dataclass(frozen=True)
class RoutingRow:
    """One token's routing."""

    iteration: int
    phase: str
    token_id: int
    token: str | None  # where the trace has a vocabulary
    expert_ids: list[list[int]]  # [L, up to K]
    weights: list[list[float]] | None

    def as_dict(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        token = "" if self.token is None else f" {self.token!r}"
        lines = [f"iteration {self.iteration} ({self.phase}), token {self.token_id}{token}"]
        width = len(str(len(self.expert_ids) - 1))
        for layer, ids in enumerate(self.expert_ids):
            weights = self.weights[layer] if self.weights else [None] * len(ids)
            cells = [f"{i:>4}" + ("" if w is None else f" {w:.3f}") for i, w in zip(ids, weights, strict=True)]
            lines.append(f"  layer {layer:>{width}}: {' '.join(cells)}")
        return "\n".join(lines)


def rows(trace: Trace, index: int, count: int) -> list[RoutingRow]:
    """The first `count` token rows of a request."""
    request, header = trace.request(index), trace.header
    vocabulary = dict(enumerate(header.vocabulary or ()))
    iterations = np.repeat(np.arange(len(request)), np.diff(request.rows))
    shown = []
    for row in range(min(count, len(request.token_ids))):
        executed = request.expert_ids[row] < header.experts  # [L, K]
        token, weights = int(request.token_ids[row]), request.weights
        shown.append(
            RoutingRow(
                iteration=int(iterations[row]),
                phase="prefill" if request.phases[iterations[row]] == PREFILL else "decode",
                token_id=token,
                token=vocabulary.get(token),
                expert_ids=[ids[ran].tolist() for ids, ran in zip(request.expert_ids[row], executed, strict=True)],
                weights=None
                if weights is None
                else [own[ran].astype(float).tolist() for own, ran in zip(weights[row], executed, strict=True)],
            )
        )
    return shown


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    importing = actions.add_parser("import", help="convert routing recorded by another tool")
    importing.add_argument("source", metavar="SRC", help="folder or file; the format is detected")
    importing.add_argument("--out", required=True, metavar="FILE", help="the trace to write")
    importing.add_argument("--model", default=None, help="name of the model (default: the source's)")
    importing.add_argument(
        "--experts", type=int, default=None, help="routed experts per layer, if the source does not say"
    )
    importing.add_argument("--licence", default=None, help="licence of the data, kept in the trace")
    importing.add_argument("--force", action="store_true", help="replace FILE if it exists")
    info = actions.add_parser("info", help="describe a trace")
    head = actions.add_parser("head", help="show the first rows")
    head.add_argument("--rows", type=int, default=8, help="how many (default: %(default)s)")
    head.add_argument("--request", type=int, default=0, help="of which request, from 0 on (default: %(default)s)")
    stats = actions.add_parser("stats", help="measure the routing's locality, skew and predictability")
    stats.add_argument("--plot", default=None, metavar="OUT.png", help="also plot it; needs finemoe[plots]")
    train = actions.add_parser("train", help="train the predictors of --policy promoe on the store split")
    train.add_argument("--out", required=True, metavar="FILE", help="the predictors to write")
    train.add_argument("--force", action="store_true", help="replace FILE if it exists")
    train.add_argument(
        "--store-split",
        type=float,
        default=0.7,
        help="share of the requests to learn from, as in simulate (default: %(default)s)",
    )
    train.add_argument("--seed", type=int, default=0, help="seed of the split, as in simulate, and of the training")
    train.add_argument("--epochs", type=int, default=6, help="training epochs (default: %(default)s)")
    for action in (info, head, stats, train):
        action.add_argument("trace", metavar="TRACE")
    for action in (importing, info, head, stats, train):
        action.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    return _ACTIONS[arguments.action](arguments)


def _import(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from finemoe.trace.importing import TraceMetadata, import_trace

    if arguments.experts is not None and arguments.experts < 1:
        raise ConfigError(f"--experts: {arguments.experts} is not at least 1")
    metadata = TraceMetadata(arguments.model, arguments.experts, arguments.licence)
    importing = import_trace(
        arguments.source,
        arguments.out,
        metadata,
        overwrite=arguments.force,
        progress=lambda files: tqdm(files, desc="Reading", unit=" files", leave=False, delay=1, disable=None),
    )
    for notice in importing.notices:
        print(notice, file=sys.stderr)
    for _ in tqdm(importing, desc="Importing", unit=" requests", leave=False, delay=1, disable=None):
        arguments.interrupts.check()
    with open_trace(arguments.out) as trace:
        print(json.dumps(describe(trace)) if arguments.json else table(trace))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    with open_trace(arguments.trace) as trace:
        print(json.dumps(describe(trace)) if arguments.json else table(trace))
    return 0


def _head(arguments: argparse.Namespace) -> int:

    if arguments.rows < 1:
        raise ConfigError(f"--rows: {arguments.rows} is not at least 1")
    with open_trace(arguments.trace) as trace:
        if not 0 <= arguments.request < len(trace):
            raise ConfigError(f"--request: {arguments.request} is not one of the {len(trace)} requests, from 0 on")
        shown = rows(trace, arguments.request, arguments.rows)
        if arguments.json:
            print(json.dumps({"request": arguments.request, "rows": [row.as_dict() for row in shown]}))
        else:
            print("\n\n".join(map(str, shown)))
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from finemoe.trace.stats import measure

    if arguments.plot:
        from finemoe.trace.plot import check

        check(Path(arguments.plot))
    with open_trace(arguments.trace) as trace:
        stats = measure(
            trace,
            lambda requests: tqdm(requests, desc="Measuring", unit=" requests", leave=False, delay=1, disable=None),
        )
        if arguments.plot:
            from finemoe.trace.plot import draw

            draw(stats, trace.header, Path(arguments.plot))
            print(f"drawn to {arguments.plot}", file=sys.stderr)
    print(json.dumps(stats.as_dict(), allow_nan=False) if arguments.json else stats)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from finemoe.learned.promoe_predictors import recall, save, train
    from finemoe.sim.workload import TraceView
    from finemoe.trace.stats import split

    out = Path(arguments.out)
    refuse_unwritable("--out", out)
    if out.exists() and not arguments.force:
        raise ConfigError(f"--out: {out} exists; give --force to replace it")
    if not 0 < arguments.store_split < 1:
        raise ConfigError(f"--store-split: {arguments.store_split} is not a share between 0 and 1")
    if arguments.epochs < 1:
        raise ConfigError(f"--epochs: {arguments.epochs} is not at least 1")
    with open_trace(arguments.trace) as trace:
        view, header = TraceView(trace), trace.header
        if "gates" not in view.fields:
            raise ConfigError(f"{arguments.trace}: has no gate distributions or weights to learn from")
        stored, _ = split(len(trace), arguments.store_split, arguments.seed)
        kept = max(1, len(stored) // 10)  # held back to measure recall
        with tqdm(desc="Training", unit=" steps", leave=False, delay=1, disable=None) as bar:

            def progress(done: int, total: int, loss: float) -> None:
                bar.total = total
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update(done - bar.n)
                arguments.interrupts.check()

            predictors = train(
                view.recorded(stored[kept:].tolist()), header.layers, header.experts, seed=arguments.seed,
                epochs=arguments.epochs, progress=progress,
            )  # fmt: skip
        recalls = recall(predictors, view.recorded(stored[:kept].tolist()))
    try:
        save(predictors, out, header.fingerprint or header.model)
    except OSError as error:
        raise ConfigError(f"--out: {out} can't be written ({error.strerror or error})") from error
    mean = float(recalls[predictors.stride :].mean())
    if arguments.json:
        print(json.dumps({"out": str(out), "recall": recalls.tolist(), "mean_recall": mean, "held_back": kept}))
    else:
        print(f"{out}: predictors {predictors.stride} layers ahead; recall {mean:.1%} on {kept} requests held back")
    return 0


def describe(trace: Trace) -> dict[str, Any]:
    """Describes a trace as a JSON object; of the vocabulary, only its size."""
    from finemoe.trace.spool import pending_requests

    header = trace.header.as_dict()
    vocabulary = header.pop("vocabulary")
    return header | {
        "path": str(trace.path),
        "requests": len(trace),
        "iterations": trace.iterations,
        "tokens": trace.tokens,
        "bytes": trace.size_bytes,
        "decode_only": trace.decode_only,
        "missing": list(trace.header.missing),
        "vocabulary_size": None if vocabulary is None else len(vocabulary),
        "left_behind": pending_requests(trace.path),
    }


def table(trace: Trace) -> str:
    """The description as text."""
    described = describe(trace)
    header = trace.header
    phases = ", decoding only" if trace.decode_only else ""
    lines = [
        f"{trace.path}: routing of {header.model}",
        f"{header.layers} MoE layers, {header.experts} experts each, {header.active} active",
        f"{len(trace)} requests, {trace.iterations} iterations, {trace.tokens} tokens{phases}",
        f"{format_bytes(trace.size_bytes)} on disk",
        f"source: {header.source}{f'; licence: {header.licence}' if header.licence else ''}",
        f"recorded: {', '.join(('ids', *header.fields))}",
    ]
    if header.missing:
        lines.append(f"not recorded: {', '.join(header.missing)}")
    if header.normalisation:
        lines.append(f"distributions: {header.normalisation}")
    if header.lookahead:
        lines.append(f"lookahead: {header.lookahead} layers")
    if header.vocabulary is not None:
        lines.append(f"vocabulary: {len(header.vocabulary)} strings")
    if header.fingerprint:
        lines.append(f"model fingerprint: {header.fingerprint}")
    if header.settings:
        lines.append("settings: " + ", ".join(f"{name} {value}" for name, value in header.settings.items()))
    if header.notes:
        lines.append(f"notes: {header.notes}")
    if described["left_behind"]:
        lines.append(
            f"{described['left_behind']} more requests are in {trace.path}.partial: resume with finemoe record --append"
        )
    return "\n".join(lines)


_ACTIONS = {"import": _import, "info": _info, "head": _head, "stats": _stats, "train": _train}
