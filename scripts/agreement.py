"""Compares the simulator with the running engine: the same requests through both.

    python scripts/agreement.py OUT.json --prompts FILE --prompts-limit 3 --store TRACE --predictors FILE \
        --budgets 15%,25%,50% --policies lru,lfru,deepspeed,mixtral-offloading,moe-infinity,promoe,expert-map,finemoe

The prompts are recorded first (OUT.trace). Then, row by row, `finemoe bench` answers them, and the simulator replays
the recording on a machine with the figures that this row has measured: link ratio, slowdown of prefetches, share of a
layer before its gate, gap between tokens, lag of the policy, prompt tokens that a layer computes in the time of one.
OUT is written after every row. Rows that it has already are only simulated again, not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import finemoe
from finemoe.bench import BenchConfig
from finemoe.bench.inputs import Request, read_requests
from finemoe.bench.measurements import Phase, PromptsResult
from finemoe.bench.run import run_bench
from finemoe.bench.worker_process import run_requests
from finemoe.budget import parse_budget
from finemoe.checkpoint import locate
from finemoe.config import GenerateConfig
from finemoe.errors import FinemoeError
from finemoe.jit import compiler
from finemoe.model import chosen_model
from finemoe.model.generation import Session
from finemoe.policy import BOUNDS, compute_future, make_policy, policy_class, policy_or_bound_class
from finemoe.sim.hardware import Machine
from finemoe.sim.simulator import Outcome, Simulation
from finemoe.sim.workload import Schedule, TraceView, make_schedule
from finemoe.store.direct_io import CHUNK_BYTES
from finemoe.trace import DECODE, TraceWriter, open_trace
from finemoe.trace.recorder import Recorder

SEEDS = 5  # runs of the simulator where times are random
ALL_POLICIES = "lru,lfru,deepspeed,mixtral-offloading,moe-infinity,promoe,expert-map,finemoe"
FIGURES = (
    "layer_s", "expert_s", "outside_s", "link_ratio", "before_gate", "gap", "lag", "begin_lag", "prefetch_slowdown",
    "compute_spread", "link_spread", "lag_spread", "tokens_per_unit", "ttft_s", "tpot_s",
    "decode_hit_rate", "stall_share",
)  # fmt: skip


class Simulator:
    """Replays the recorded requests in order, under policies that have learned from another trace.

    Args:
        trace: the recording.
        store: trace to learn from; `None`: policies start empty.
        predictors: file for the policies that need it.
    """

    def __init__(self, trace: Path, store: str | None, predictors: str | None) -> None:
        self._jit = compiler()
        self._trace = open_trace(trace)
        self._view = TraceView(self._trace, jit=self._jit)
        self._store = None if store is None else TraceView(open_trace(store), jit=self._jit)
        self._predictors = predictors
        self.schedule: Schedule = make_schedule(self._trace, range(len(self._trace)), 1, self._jit)

    @property
    def inputs(self) -> list[list[int]]:
        """The answer tokens of each request that were fed back to the model: all but the last."""
        requests = [self._trace.request(i) for i in range(len(self._trace))]
        return [request.token_ids[request.rows[1] :].tolist() for request in requests]

    @property
    def slots(self) -> int:
        """Slots of a budget of all experts."""
        return self._trace.header.layers * self._trace.header.experts

    def run(self, name: str, machine: Machine) -> dict[str, Any]:
        """Rates, and a decoded token's time in units of one layer's compute: means over the seeds."""
        once = [self._run(name, replace(machine, seed=seed)) for seed in range(SEEDS if machine.compute_spread else 1)]
        named = {figure: [each[figure] for each in once] for figure in once[0]}
        means = {figure: None if None in values else fmean(values) for figure, values in named.items()}
        return {**means, "machine": asdict(machine)}

    def _run(self, name: str, machine: Machine) -> dict[str, Any]:
        header, schedule = self._trace.header, self.schedule
        options: dict[str, Any] = {}
        if policy_or_bound_class(name).clairvoyant:
            options["future"] = compute_future(
                schedule.layers, schedule.experts, schedule.ptr, schedule.needs, self._jit
            )
        if "predictors" in policy_or_bound_class(name).needs:
            from finemoe.learned.promoe_predictors import load

            options["predictors"] = load(Path(self._predictors or ""), header.fingerprint or header.model)
        policy = make_policy(name, header.layers, header.experts, jit=self._jit, **options)
        if self._store is not None:
            for recorded in self._store.recorded(range(len(self._store.trace))):
                policy.learn(recorded)
        outcome: Outcome = Simulation(schedule, self._view, policy, machine, self._jit).run()
        times = outcome.iteration_times[schedule.phases == DECODE]
        return {
            **rates(outcome.hits, outcome.late, outcome.hits + outcome.late + outcome.misses),
            "token_layers": float(times.mean()) + machine.gap if len(times) else None,
        }


def rates(hits: int, late: int, accesses: int) -> dict[str, Any]:
    return {"accesses": accesses, "hit_rate": hits / accesses, "late_rate": late / accesses}


def record(given: argparse.Namespace, trace: Path) -> None:
    """Records the routing of the same forward passes that bench runs.

    `finemoe record` answers by `generate`, whose tokens differ now and then.
    """
    config = bench_config(given, given.policies[0], given.budgets[0])
    checkpoint = locate(chosen_model(config.model), config.revision)
    requests = read_requests(config, checkpoint, log).measured
    ahead = any("lookahead" in policy_class(name).needs | policy_class(name).uses for name in given.policies)
    if given.threads:
        torch.set_num_threads(given.threads)
    model = finemoe.load(str(checkpoint.folder), expert_memory="all", policy="lru", map_store="none")
    with model:
        recorder = Recorder(Session(model), GenerateConfig(max_new_tokens=given.new_tokens), int(ahead))
        with TraceWriter(trace, recorder.header) as writer:
            for number, request in enumerate(requests, 1):
                log(f"recording {number} of {len(requests)} ...")
                answer = partial(answered, model, request, given.new_tokens)
                writer.add(recorder.record_call(answer, len(request)))


def answered(model: Any, request: Request, new_tokens: int) -> int:
    """Answers a request. Returns the number of its tokens."""
    return len(run_requests(model, [request], new_tokens)[0].tokens)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def bench_config(given: argparse.Namespace, policy: str, budget: str) -> BenchConfig:
    return BenchConfig(
        model=given.model, prompts=given.prompts, prompts_limit=given.prompts_limit, prompt_field=given.prompt_field,
        store=given.store, predictors=given.predictors if needs_predictors(policy) else None, policy=policy,
        expert_memory=budget, new_tokens=given.new_tokens, repeats=given.repeats, threads=given.threads,
        baselines="none", link_bandwidth=given.link_bandwidth,
    )  # fmt: skip


def measure(given: argparse.Namespace, policy: str, budget: str) -> dict[str, Any]:
    """One row of the engine: its counts over prompts and answers, and the figures for the simulator."""
    report = run_bench(bench_config(given, policy, budget), log)
    row = report.rows[0]
    done = [run.measured for run in row.runs if isinstance(run.measured, PromptsResult)]
    if not done:
        return {"error": row.error}
    phases: list[Phase] = [p for each in done for answer in each.answers for p in (answer.prompt, answer.decode)]
    hits, late, accesses = (sum(getattr(p, name) for p in phases) for name in ("hits", "late", "accesses"))
    steps = [s for each in done for answer in each.answers for s in answer.decode.seconds]
    return {
        **rates(hits, late, accesses),
        "runs": len(done),
        "answers": [list(answer.tokens) for answer in done[0].answers],
        "tokens_equal": report.tokens_equal,
        "token_s": sum(steps) / len(steps) if steps else None,
        "expert_bytes": done[0].expert_bytes,
        **{name: row.figure(name) for name in FIGURES},
    }


def needs_predictors(policy: str) -> bool:
    return "predictors" in policy_class(policy).needs


def machine_of(engine: dict[str, Any], budget: str, simulator: Simulator) -> Machine:
    """The simulator's model of the machine, as one row of the engine measured it."""
    return Machine(
        capacity=parse_budget(budget).slots(1, simulator.slots),
        link_ratio=engine["link_ratio"] or 0.0,  # None: nothing was read
        chunks=max(1, round(engine["expert_bytes"] / CHUNK_BYTES)),
        tokens_per_unit=engine["tokens_per_unit"],
        before_gate=engine["before_gate"],
        gap=engine["gap"] or 0.0,
        lag=engine["lag"] or 0.0,
        begin_lag=engine["begin_lag"],
        prefetch_slowdown=engine["prefetch_slowdown"] or 1.0,
        compute_spread=engine["compute_spread"] or 0.0,
        link_spread=engine["link_spread"] or 0.0,
        lag_spread=engine["lag_spread"] or 0.0,
    )


def simulate(row: dict[str, Any], simulator: Simulator) -> None:
    """Adds simulations to a measured row: as measured, with constant times (`even`), without slowdown (`as_fast`)."""
    engine, machine = row["engine"], machine_of(row["engine"], row["budget"], simulator)
    row["simulator"] = simulator.run(row["policy"], machine)
    even = replace(machine, compute_spread=0.0, link_spread=0.0, lag_spread=0.0)
    row["even"] = simulator.run(row["policy"], even)
    row["as_fast"] = simulator.run(row["policy"], replace(even, prefetch_slowdown=1.0))
    row["difference"] = engine["hit_rate"] - row["simulator"]["hit_rate"]
    row["as_recorded"] = (
        bool(engine["tokens_equal"]) and [answer[:-1] for answer in engine["answers"]] == simulator.inputs
    )
    token_layers = row["simulator"]["token_layers"]
    row["simulated_token_s"] = None if token_layers is None else token_layers * engine["layer_s"]


def orders(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of policies whose order by hit rate differs between engine and simulator."""
    return [
        (one["policy"], other["policy"])
        for one, other in combinations(rows, 2)
        if (one["engine"]["hit_rate"] - other["engine"]["hit_rate"])
        * (one["simulator"]["hit_rate"] - other["simulator"]["hit_rate"])
        < 0
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as a Markdown table."""
    columns = (
        "", "engine: hits, late", "simulator: hits, late", "difference", "constant times",
        "no slowdown either", "r", "slowdown", "spreads", "ms a token: engine, simulator",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * 9]
    for row in rows:
        engine, found, name = row["engine"], row.get("simulator"), name_of(row)
        if found is None:
            lines.append(f"| {name} | {engine.get('error', 'not measured')} |" + " |" * 8)
            continue
        machine = found["machine"]
        token_ms = [f"{1000 * s:.0f}" if s else "-" for s in (engine["token_s"], row["simulated_token_s"])]
        lines.append(
            f"| {name} | {engine['hit_rate']:.1%}, {engine['late_rate']:.1%} | {found['hit_rate']:.1%}, "
            f"{found['late_rate']:.1%} | {100 * row['difference']:+.1f} | {row['even']['hit_rate']:.1%} | "
            f"{row['as_fast']['hit_rate']:.1%} | {machine['link_ratio']:.2f} | "
            f"{machine['prefetch_slowdown']:.2f} | {machine['compute_spread']:.2f}, {machine['link_spread']:.2f} | "
            f"{', '.join(token_ms)} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Whether both agree on the order of policies and on hit rates, in lines."""
    lines = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        swapped = orders([row for row in rows if row["budget"] == budget])
        pairs = "; ".join(f"{a} and {b} change places" for a, b in swapped)
        lines.append(f"{budget}: {pairs or 'the same order'}")
    if rows:
        worst = max(rows, key=lambda row: abs(row["difference"]))
        within = sum(abs(row["difference"]) <= 0.02 for row in rows)
        most = f"{100 * worst['difference']:+.1f} at {name_of(worst)}"
        lines.append(f"within two points: {within} of {len(rows)}; most: {most}")
    different = [name_of(row) for row in rows if not row["as_recorded"]]
    return lines + [f"{name}: THE ENGINE'S TOKENS DIFFER FROM THE RECORDING" for name in different]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--prompts", required=True, help="as for finemoe bench")
    parser.add_argument("--prompts-limit", type=int, default=3)
    parser.add_argument("--prompt-field")
    parser.add_argument("--budgets", default="15%,25%,50%", help="shares of all routed experts")
    parser.add_argument("--policies", default=ALL_POLICIES)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--model", help="folder or hub id (default: the reference model)")
    parser.add_argument("--store", help="trace of other prompts that policies learn from first")
    parser.add_argument("--predictors", help="for policies that need them, from finemoe trace train")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--link-bandwidth", help="throttle the engine's link to this")
    given = parser.parse_args()
    given.budgets = [word.strip() for word in given.budgets.split(",")]
    given.policies = [word.strip() for word in given.policies.split(",")]
    try:
        for budget in given.budgets:
            if parse_budget(budget, "--budgets").share is None:
                parser.error(f"--budgets: {budget!r}: a trace has no bytes; give shares, such as 25%")
        lacking = [name for name in given.policies if needs_predictors(name) and given.predictors is None]
    except FinemoeError as error:
        parser.error(str(error))
    if lacking:
        parser.error(f"--policies: {lacking[0]} needs --predictors FILE, from finemoe trace train")
    if not given.out.absolute().parent.is_dir():
        parser.error(f"{given.out}: there is no folder {given.out.absolute().parent}")
    return given


class Result:
    """The rows of OUT, including those of an earlier run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._out = given.out
        own = {"out", "budgets", "policies"}
        self._settings = {name: value for name, value in vars(given).items() if name not in own}
        self.rows: dict[str, dict[str, Any]] = {}
        self.bounds: dict[str, dict[str, Any]] = {}
        if self._out.exists():
            earlier = json.loads(self._out.read_text(encoding="utf-8"))
            if earlier["settings"] != self._settings:
                raise SystemExit(f"{self._out} has rows of other settings; give another file")
            self.rows = {name_of(row): row for row in earlier["rows"] if "error" not in row["engine"]}

    @property
    def simulated(self) -> list[dict[str, Any]]:
        return [row for row in self.rows.values() if "simulator" in row]

    def save(self) -> None:
        document = {
            "settings": self._settings,
            "rows": list(self.rows.values()),
            "bounds": list(self.bounds.values()),
            "summary": summary(self.simulated),
        }
        partial = self._out.with_name(f".{self._out.name}.partial")
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._out)


def name_of(row: dict[str, Any]) -> str:
    return f"{row['budget']} {row['policy']}"


def main() -> int:
    given = parse()
    result = Result(given)
    trace = given.out.with_suffix(".trace")
    if not result.rows:
        trace.unlink(missing_ok=True)
    if not trace.exists():
        record(given, trace)
    simulator = Simulator(trace, given.store, given.predictors)
    for budget in given.budgets:
        machine = None
        for policy in given.policies:
            row = {"budget": budget, "policy": policy}
            known = result.rows.get(name_of(row))
            row |= {"engine": known["engine"] if known else measure(given, policy, budget)}
            result.rows[name_of(row)] = row
            if row["engine"].get("layer_s"):
                machine = machine_of(row["engine"], budget, simulator)
                simulate(row, simulator)
            result.save()
        for policy in BOUNDS if machine else ():  # on the last row's machine
            row = {"budget": budget, "policy": policy, "simulator": simulator.run(policy, machine)}
            result.bounds[name_of(row)] = row
        result.save()
    print(table(list(result.rows.values())), *summary(result.simulated), sep="\n")
    for name, row in result.bounds.items():
        found = row["simulator"]
        print(f"{name}, simulated on the machine of {given.policies[-1]}: {found['hit_rate']:.1%} hits, "
              f"{found['late_rate']:.1%} late")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
