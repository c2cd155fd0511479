"""`finemoe maps`: shows, merges, prunes and makes files of expert maps."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from finemoe.budget import format_bytes
from finemoe.cli.flags import Parser
from finemoe.errors import ConfigError
from finemoe.learned import Maps, merge, prune, read_maps, write_maps
from finemoe.system import refuse_unwritable


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    info = actions.add_parser("info", help="describe a file")
    merging = actions.add_parser("merge", help="merge files into one, taking the newest maps of each in turn")
    merging.add_argument("files", metavar="FILE", nargs="+")
    merging.add_argument("--capacity", type=int, default=None, help="keep this many, the newest (default: all)")
    pruning = actions.add_parser("prune", help="keep fewer maps, dropping the most redundant first")
    pruning.add_argument("--keep", type=int, required=True, metavar="N", help="how many maps to keep")
    learning = actions.add_parser("learn", help="learn maps from a recorded trace")
    learning.add_argument("trace", metavar="TRACE")
    learning.add_argument("--policy", default="finemoe", help="the policy that learns (default: %(default)s)")
    learning.add_argument("--capacity", type=int, default=None, help="maps to hold (default: the policy's own)")
    showing = actions.add_parser("show", help="compare a policy's predictions with a recorded request")
    showing.add_argument("trace", metavar="TRACE")
    showing.add_argument("--request", type=int, required=True, metavar="N", help="which request, from 0 on")
    showing.add_argument("--iteration", type=int, default=None, help="one of its iterations (default: all decoded)")
    showing.add_argument("--policy", default="finemoe", help="the policy that predicts (default: %(default)s)")
    showing.add_argument(
        "--map-store",
        default=None,
        metavar="FILE",
        help="the maps it uses (default: learned from a seeded 70%% of TRACE)",
    )
    showing.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    showing.add_argument("--plot", default=None, metavar="OUT.png", help="draw it; needs finemoe[plots]")
    for action in (info, pruning):
        action.add_argument("file", metavar="FILE")
    for action in (merging, learning):
        action.add_argument("--out", required=True, metavar="OUT", help="the file to write")
    pruning.add_argument("--out", default=None, metavar="OUT", help="the file to write (default: FILE is replaced)")
    for action in (merging, pruning, learning):
        action.add_argument("--force", action="store_true", help="replace OUT if it exists")
    for action in (info, merging, pruning, learning, showing):
        action.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    return _ACTIONS[arguments.action](arguments)


def _info(arguments: argparse.Namespace) -> int:
    path = Path(arguments.file)
    described = describe(path, read_maps(path))
    print(json.dumps(described) if arguments.json else table(described))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    out = _out(arguments)
    if len(arguments.files) < 2:
        raise ConfigError("FILE: give at least two files to merge")
    _at_least_one("--capacity", arguments.capacity)
    stores = [read_maps(Path(file)) for file in arguments.files]
    for file, store in zip(arguments.files[1:], stores[1:], strict=True):
        if difference := stores[0].incompatibility(store):
            raise ConfigError(f"{file} can't be merged with {arguments.files[0]}: another {difference}")
    return _written(merge(stores, arguments.capacity), out, arguments, sum(map(len, stores)))


def _prune(arguments: argparse.Namespace) -> int:
    path = Path(arguments.file)
    out = path if arguments.out is None else _out(arguments)
    _at_least_one("--keep", arguments.keep)
    maps = read_maps(path)
    if arguments.out is None:
        refuse_unwritable("FILE", path)
    return _written(prune(maps, arguments.keep, tick=arguments.interrupts.check), out, arguments, len(maps))


def _learn(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from finemoe.jit import compiler
    from finemoe.policy import FACTORIES, make_policy, policy_class
    from finemoe.sim.workload import TraceView
    from finemoe.trace import open_trace

    out = _out(arguments)
    if not policy_class(arguments.policy).is_persistent:
        able = ", ".join(name for name, kind in FACTORIES.items() if kind.is_persistent)
        raise ConfigError(f"--policy: {arguments.policy} learns no maps; choose one of {able}")
    _at_least_one("--capacity", arguments.capacity)
    with open_trace(arguments.trace) as trace:
        header, view = trace.header, TraceView(trace)
        if "gates" not in view.fields:
            raise ConfigError(f"{arguments.trace}: has no gate distributions or weights to learn from")
        options: dict[str, Any] = {} if arguments.capacity is None else {"capacity": arguments.capacity}
        policy = make_policy(arguments.policy, header.layers, header.experts, jit=compiler(), **options)
        requests = view.recorded(range(len(trace)))
        for recorded in tqdm(
            requests, total=len(trace), desc="Learning", unit=" requests", leave=False, delay=1, disable=None
        ):
            arguments.interrupts.check()
            policy.learn(recorded)
    if not policy.num_updates:
        raise ConfigError(f"{arguments.trace}: has no decoded token to learn from")
    maps = Maps(
        arguments.policy, header.fingerprint or header.model, header.model, header.layers, header.experts,
        policy.state_dict(),
    )  # fmt: skip
    return _written(maps, out, arguments, policy.num_updates)


def _show(arguments: argparse.Namespace) -> int:
    from finemoe.jit import compiler
    from finemoe.policy import make_policy, policy_class
    from finemoe.sim.prediction_report import draw_prediction, predict_request
    from finemoe.sim.report import check_plot
    from finemoe.trace import open_trace, split

    if "predictors" in policy_class(arguments.policy).needs:
        raise ConfigError(f"--policy: {arguments.policy} makes no predictions by layer")
    if arguments.plot is not None:
        check_plot(Path(arguments.plot))
    with open_trace(arguments.trace) as trace:
        header, jit = trace.header, compiler()
        policy = make_policy(arguments.policy, header.layers, header.experts, jit=jit)
        store: list[int] = []
        if arguments.map_store is None:
            store = split(len(trace), _STORE_SHARE, arguments.seed)[0].tolist()
        else:
            maps = read_maps(Path(arguments.map_store))
            if (maps.policy, maps.layers, maps.experts) != (arguments.policy, header.layers, header.experts):
                raise ConfigError(f"--map-store: {arguments.map_store} is for another policy or model shape")
            policy.load_state_dict(maps.arrays)
        found = predict_request(trace, policy, arguments.request, store, jit)
    if arguments.iteration is not None and not 0 <= arguments.iteration < len(found.phases):
        raise ConfigError(f"--iteration: {arguments.iteration} is not one of 0 to {len(found.phases) - 1}")
    chosen = found.chosen(arguments.iteration)
    recall = found.recall[chosen].mean(axis=0)
    described = {
        "trace": arguments.trace, "request": arguments.request, "policy": arguments.policy,
        "iterations": int(chosen.sum()), "recall": float(recall.mean()), "recall_by_layer": recall.tolist(),
    }  # fmt: skip
    if arguments.plot is not None:
        which = "" if arguments.iteration is None else f", iteration {arguments.iteration}"
        title = f"{header.model}, request {arguments.request}{which}: {arguments.policy}"
        draw_prediction(found, title, Path(arguments.plot), arguments.iteration)
        print(f"drawn to {arguments.plot}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(described))
    else:
        print(f"recall of {arguments.policy}, experts predicted of those needed: {recall.mean():.1%}")
        for layer, share in enumerate(recall):
            print(f"layer {layer:3}  {share:6.1%}  {'#' * round(40 * share)}")
    return 0


def describe(path: Path, maps: Maps) -> dict[str, Any]:
    """Describes a file as a JSON object."""
    return {"path": str(path), "bytes": path.stat().st_size} | maps.summary()


def table(described: dict[str, Any]) -> str:
    """The description as text."""
    count = described["stretches"]
    stretches = (
        "" if count is None else f", in {count} {'stretch' if count == 1 else 'stretches'} of successive iterations"
    )
    keys = f", embeddings of {described['embedding_width']} numbers" if described["embedding_width"] else ""
    shape = f"{described['layers']} MoE layers, {described['experts']} experts each, {described['active']} active{keys}"
    return "\n".join(
        [
            f"{described['path']}: {described['maps']} expert maps of --policy {described['policy']}{stretches}",
            f"model: {described['model']} (fingerprint {described['fingerprint']})",
            shape,
            f"{format_bytes(described['bytes'])} on disk, {format_bytes(described['memory_bytes'])} in memory",
        ]
    )


def _written(maps: Maps, out: Path, arguments: argparse.Namespace, before: int) -> int:
    try:
        write_maps(maps, out)
    except OSError as error:
        raise ConfigError(f"--out: {out} can't be written ({error.strerror or error})") from error
    described = describe(out, maps) | {"maps_before": before}
    print(json.dumps(described) if arguments.json else f"kept {len(maps)} of {before} maps\n{table(described)}")
    return 0


def _out(arguments: argparse.Namespace) -> Path:
    out = Path(arguments.out)
    refuse_unwritable("--out", out)
    if out.exists() and not arguments.force:
        raise ConfigError(f"--out: {out} exists; give --force to replace it")
    return out


def _at_least_one(flag: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{flag}: {value} is not at least 1")


_ACTIONS = {"info": _info, "merge": _merge, "prune": _prune, "learn": _learn, "show": _show}
_STORE_SHARE = 0.7  # of a trace's requests, as in finemoe simulate
