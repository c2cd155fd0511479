"""A served model under a published trace's load: latencies, goodput and hit rate of several policies, in one run.

    python scripts/load.py --arrivals AzureLLMInferenceTrace_conv.csv --prompts arena_hard_questions.jsonl
        --policy lru,moe-infinity,mixtral-offloading,finemoe --limit-s 1800 --json load.json

Requests come when those of the trace came, the time between them stretched so that their mean rate is `--rate`; `auto`
is `--utilisation` times what four clients who ask without pause got of the first policy. A request has the trace's
context and answer lengths, times `--prompt-scale` and `--answer-scale` and bounded; its text are the prompts, one after
another, cut at that length. It is sent at its time by OpenAI's client, whatever the server does meanwhile; latencies
count from that time.

Every policy gets the same requests, from a `finemoe serve` of its own with an empty pool; servers run in turn, in each
repeat in another order, and each repeat takes the next stretch of the trace. The prompts are split by `--seed`: 70% to
learn from and to calibrate with, 30% to measure with. Policies that learn begin every time with what they learned from
`--warm-requests` of the former, answered beforehand, or from the trace `--store` (then it is yours to hold its prompts
apart).

SLO: a request is good if its first token came within `--slo-ttft-s` and the mean of its later ones within
`--slo-tpot-s`; `auto` is five times and twice what a request alone took. Refused and lost ones are not good.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from arrivals import Ask, Lengths, fill, read_arrivals, window
from asking import Answered, Asker, in_turn, play
from serve_process import MAIN, align, came, end_as_by_ctrl_c, number, serve_process, tell, write_whole
from transformers import AutoTokenizer

from finemoe.errors import FinemoeError
from finemoe.policy import policy_class
from finemoe.trace import split
from finemoe.trace.prompts import read_prompts

STORE_SHARE = 0.7  # of the prompts
CLIENTS = 4  # that calibrate, and that policies learn from
ALONE = 4  # requests that calibrate an unloaded server; the first is not counted
DRAIN_SHARE = 0.25  # of a cell's time, for the requests under way when the last has come


class Load:
    """One run of the program."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given = given
        self.folder = folder
        self.begin_s = time.perf_counter()
        self.model = _model(given.model)
        self.policies = [" ".join(named.split()) for named in given.policy.split(",")]
        for policy in self.policies:
            policy_class(shlex.split(policy)[0])  # refuses what it does not know
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.chat = bool(tokenizer.chat_template)
        self.encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self.decode = tokenizer.decode
        texts = read_prompts(Path(given.prompts)).texts
        learned, measured = split(len(texts), STORE_SHARE, given.seed)
        self.learned, self.measured = [texts[i] for i in learned], [texts[i] for i in measured]
        self.arrivals = read_arrivals(Path(given.arrivals))
        self.lengths = Lengths(given.prompt_scale, given.answer_scale, given.max_prompt_tokens, given.max_output_tokens)
        self.report: dict[str, Any] = {
            "settings": vars(given) | {"model": str(self.model), "chat": self.chat, "prompts_split": STORE_SHARE},
            "rate": None if given.rate == "auto" else float(given.rate),
            "slo_ttft_s": None if given.slo_ttft_s == "auto" else float(given.slo_ttft_s),
            "slo_tpot_s": None if given.slo_tpot_s == "auto" else float(given.slo_tpot_s),
            "learned_from": None,
            "cells": [],
            "left_out": [],
        }
        self.start_s = 20.0  # how long a server takes to come up, until one has

    def run(self) -> None:
        if None in {self.report[name] for name in ("rate", "slo_ttft_s", "slo_tpot_s")}:
            self.calibrate()
        stores = {policy: self.store(policy) for policy in self.policies}
        cells = [
            (repeat, policy)
            for repeat in range(self.given.repeats)
            for policy in self.policies[repeat % len(self.policies) :] + self.policies[: repeat % len(self.policies)]
        ]
        window_s = self.given.window_s or self.fitting_window_s(len(cells))
        self.report["window_s"] = window_s
        for at, (repeat, policy) in enumerate(cells):
            left_s = self.given.limit_s - self.elapsed_s()
            if left_s < window_s + self.start_s:
                self.report["left_out"] = [f"{name}, repeat {number + 1}" for number, name in cells[at:]]
                break
            self.cell(policy, repeat, window_s, stores[policy])
        self.write()

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.begin_s

    def fitting_window_s(self, cells: int) -> float:
        share_s = (self.given.limit_s - self.elapsed_s()) / cells - self.start_s
        if share_s < 5:
            raise SystemExit(f"--limit-s: {self.given.limit_s:g} leaves no time for {cells} cells; give more")
        return (1 - DRAIN_SHARE) * share_s

    def write(self) -> None:
        write_whole(self.report, self.given.json)

    def flags(self, policy: str, store: Path | None) -> list[str]:
        name, *own = shlex.split(policy)
        flags = ["--model", str(self.model), "--expert-memory", self.given.expert_memory, "--policy", name]
        flags += [*shlex.split(self.given.serve), *own]
        if policy_class(name).is_persistent:
            flags += ["--map-store", "none" if store is None else str(store)]
        return flags

    def some(self, count: int, first: int = 0) -> list[Ask]:
        """Requests of prompts that are not measured, with lengths from all over the trace."""
        every = max(1, len(self.arrivals) // count)
        return fill(self.arrivals[::every][:count], self.learned, self.lengths, self.encode, self.decode, first)

    def calibrate(self) -> None:
        """What one client, and four, get of the first policy."""
        asks = self.some(self.given.calibrate_requests + ALONE)

        async def measure(asker: Asker) -> tuple[list[Answered], list[Answered], float]:
            alone, _ = await in_turn(asker, asks[:ALONE], 1)
            together, seconds = await in_turn(asker, asks[ALONE:], CLIENTS)
            return alone[1:], together, seconds

        tell(f"calibrating on {self.policies[0]}, {len(asks)} requests")
        with serve_process(self.flags(self.policies[0], None)) as server:
            self.start_s = server.start_s
            alone, together, seconds = asyncio.run(self.asked(server, measure))
        ended = [row for row in together if row["status"] == "finished"]
        if not ended or not any("tpot_s" in row for row in alone):
            raise SystemExit(f"calibration: requests did not end well ({(alone + together)[0]})")
        found = {
            "requests_s": len(ended) / seconds,
            "tok_s": sum(row["tokens"] for row in ended) / seconds,
            "alone_ttft_s": median(row["ttft_s"] for row in alone if "ttft_s" in row),
            "alone_tpot_s": median(row["tpot_s"] for row in alone if "tpot_s" in row),
        }
        self.report["calibration"] = found
        chosen = {
            "rate": self.given.utilisation * found["requests_s"],
            "slo_ttft_s": 5 * found["alone_ttft_s"],
            "slo_tpot_s": 2 * found["alone_tpot_s"],
        }
        self.report |= {name: value for name, value in chosen.items() if self.report[name] is None}
        self.write()

    async def asked(self, server: Any, work: Any) -> Any:
        async with Asker(server.url, server.name, chat=self.chat, timeout_s=self.given.limit_s) as asker:
            return await work(asker)

    def store(self, policy: str) -> Path | None:
        """What a policy starts from; `None` if it learns nothing."""
        warm, name = self.given.warm_requests, shlex.split(policy)[0]
        if not policy_class(name).is_persistent or not (warm or self.given.store):
            return None
        path = self.folder / f"{name.replace('/', '-')}.maps"
        if path.exists():  # the same policy, with other flags
            return path
        if self.given.store:
            tell(f"{policy} learns from {self.given.store}")
            command = ["maps", "learn", self.given.store, "--policy", name.partition("/")[0], "--out", str(path)]
            subprocess.run([sys.executable, "-c", MAIN, *command], check=True, stdout=subprocess.DEVNULL)
            self.report["learned_from"] = str(self.given.store)
            return path
        tell(f"{policy} learns from {warm} requests")
        with serve_process(self.flags(policy, path)) as server:
            self.start_s = server.start_s
            rows, _ = asyncio.run(
                self.asked(server, lambda asker: in_turn(asker, self.some(warm, len(self.learned) // 2), CLIENTS))
            )
        ended = sum(row["status"] == "finished" for row in rows)
        self.report["learned_from"] = f"{ended} requests of other prompts"
        return path

    def cell(self, policy: str, repeat: int, window_s: float, store: Path | None) -> None:
        """One policy's server, and all requests of one window."""
        report = self.report
        come = window(self.arrivals, report["rate"], self.given.skip_s + repeat * window_s, window_s)
        asks = fill(come, self.measured, self.lengths, self.encode, self.decode, repeat * len(self.measured) // 2)
        own = None
        if store is not None and store.exists():
            own = shutil.copy(store, self.folder / "own.maps")  # it adds to it
        cell: dict[str, Any] = {"policy": policy, "repeat": repeat, "asked": len(asks), "requests": []}
        report["cells"].append(cell)
        tell(f"{policy}, repeat {repeat + 1}: {len(asks)} requests in {window_s:.0f} s")

        def heard(row: Answered) -> None:
            cell["requests"].append(row)
            cell["span_s"] = time.perf_counter() - begin_s
            self.write()
            tell(f"{policy}: {len(cell['requests'])} of {len(asks)}, {row['status']} after {row['total_s']:.1f} s")

        with serve_process(self.flags(policy, own)) as server:
            before, begin_s = server.figures(), time.perf_counter()
            try:
                asyncio.run(self.asked(server, lambda asker: play(asker, asks, heard)))
            finally:
                with suppress(OSError):  # the server may be what has failed
                    cell |= came(before, server.figures())
        self.write()


def figures(cells: Sequence[dict[str, Any]], slo_ttft_s: float, slo_tpot_s: float) -> dict[str, Any]:
    """All cells of one policy as one row. Percentiles are over requests; rates over the cells' whole time."""
    requests = [row for cell in cells for row in cell["requests"]]
    span_s = sum(cell.get("span_s", 0.0) for cell in cells)
    ended = [row for row in requests if row["status"] == "finished"]
    good = [row for row in ended if row["ttft_s"] <= slo_ttft_s and row.get("tpot_s", 0.0) <= slo_tpot_s]
    accesses = sum(cell.get("accesses", 0) for cell in cells)
    tokens = sum(row["tokens"] for row in ended)
    row: dict[str, Any] = {
        "asked": sum(cell["asked"] for cell in cells),
        "tok_s": tokens / span_s if span_s else None,
        "goodput": len(good) / len(requests) if requests else None,
        "goodput_tok_s": sum(row["tokens"] for row in good) / span_s if span_s else None,
        "stall_share": sum(cell.get("stall_s", 0.0) for cell in cells) / span_s if span_s else None,
        "bytes_per_token": sum(cell.get("bytes_read", 0.0) for cell in cells) / tokens if tokens else None,
        "worst_late_s": max((row["late_s"] for row in requests), default=None),
    }
    for name in ("ttft_s", "tpot_s"):
        values = [row[name] for row in requests if name in row]
        for q in (50, 95, 99):
            row[f"{name}_p{q}"] = float(np.percentile(values, q)) if values else None
    for result in ("hit", "late", "miss"):
        counted = sum(cell[f"{result}_rate"] * cell["accesses"] for cell in cells if cell.get("accesses"))
        row[f"{result}_rate"] = counted / accesses if accesses else None
    for status in ("finished", "refused", "timeout", "error", "lost"):
        row[status] = sum(one["status"] == status for one in requests)
    return row


def render(report: dict[str, Any]) -> str:
    """The report as a table, with what it was measured under."""
    given = report["settings"]
    head = (
        "policy", "asked", "TTFT p50 s", "p95", "p99", "TPOT p50 ms", "p95", "p99", "tok/s", "good", "good tok/s",
        "hit / late / miss", "stall", "MiB/tok", "refused", "timeout", "error", "lost",
    )  # fmt: skip
    rows = [head]
    for policy in dict.fromkeys(cell["policy"] for cell in report["cells"]):
        cells = [cell for cell in report["cells"] if cell["policy"] == policy]
        row = figures(cells, report["slo_ttft_s"], report["slo_tpot_s"])
        rates = [row[f"{result}_rate"] for result in ("hit", "late", "miss")]
        rows.append((
            policy, str(row["asked"]),
            *(number(row[f"ttft_s_p{q}"], ".2f") for q in (50, 95, 99)),
            *(number(row[f"tpot_s_p{q}"], ".0f", 1000) for q in (50, 95, 99)),
            number(row["tok_s"], ".2f"), number(row["goodput"], ".0%"), number(row["goodput_tok_s"], ".2f"),
            "-" if None in rates else " / ".join(f"{100 * rate:.1f}" for rate in rates) + "%",
            number(row["stall_share"], ".0%"), number(row["bytes_per_token"], ".1f", 1 / (1 << 20)),
            *(str(row[status]) for status in ("refused", "timeout", "error", "lost")),
        ))  # fmt: skip
    without_pause = report.get("calibration", {}).get("requests_s")
    found = f"; four clients without pause got {without_pause:.3f} requests/s" if without_pause else ""
    lines = [
        f"model {given['model']}, {given['expert_memory']} of the experts {given['serve']}".rstrip(),
        f"load  {Path(given['arrivals']).name} at {report['rate']:.3f} requests/s{found};",
        f"      {given['repeats']} windows of {report.get('window_s', 0):.0f} s",
        f"asks  {Path(given['prompts']).name}, {'chat' if given['chat'] else 'completions'}, greedy, streamed;",
        f"      contexts x {given['prompt_scale']:g}, at most {given['max_prompt_tokens']} tokens;",
        f"      answers x {given['answer_scale']:g}, at most {given['max_output_tokens']}",
        f"maps  policies that learn began with {report['learned_from'] or 'nothing'}",
        "",
        align(rows),
        "",
    ]
    if report["left_out"]:
        lines.append(f"Left out for want of time: {', '.join(report['left_out'])}.")
    slo = f"{report['slo_ttft_s']:.2f} s, later ones within {1000 * report['slo_tpot_s']:.0f} ms on average"
    lines += [
        f"good: first token within {slo}; share of all that were asked.",
        "TTFT from the time at which a request was due; TPOT: a request's mean. stall: share of the cells' time.",
    ]
    return "\n".join(lines)


def _model(named: str | None) -> Path:
    if named is None:
        from finemoe.model import reference_model

        return Path(reference_model())
    return Path(named)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arrivals", required=True, help="CSV: TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--prompts", required=True, help="a file as for finemoe record")
    parser.add_argument("--model", help="folder (default: the reference model)")
    parser.add_argument(
        "--policy",
        default="lru,moe-infinity,mixtral-offloading,finemoe",
        help="each may be followed by flags of its own",
    )
    parser.add_argument("--expert-memory", default="25%")
    parser.add_argument("--serve", default="", metavar="FLAGS", help="further flags of finemoe serve, in one string")
    parser.add_argument("--rate", default="auto", help="requests/s on average, or auto")
    parser.add_argument("--utilisation", type=float, default=0.7, help="of what auto found, the part that is asked for")
    parser.add_argument("--calibrate-requests", type=int, default=12)
    parser.add_argument("--warm-requests", type=int, default=32, help="that policies learn from first; 0 for none")
    parser.add_argument("--store", metavar="TRACE", help="a recorded trace to learn from instead")
    parser.add_argument("--prompt-scale", type=float, default=0.125)
    parser.add_argument("--answer-scale", type=float, default=0.25)
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--max-output-tokens", type=int, default=128)
    parser.add_argument("--slo-ttft-s", default="auto")
    parser.add_argument("--slo-tpot-s", default="auto")
    parser.add_argument("--repeats", type=int, default=1, help="windows of the trace, each for all policies")
    parser.add_argument("--window-s", type=float, help="length of one (default: what fits into --limit-s)")
    parser.add_argument("--skip-s", type=float, default=0.0, help="where the first begins, in stretched time")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="begin no cell that would end later")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts' split")
    parser.add_argument("--json", metavar="OUT", help="write all requests here, as they end")
    return parser


def main() -> None:
    given = flags().parse_args()
    os.environ["FINEMOE_MAPS"] = "none"  # no server touches the user's own
    end_as_by_ctrl_c()
    with tempfile.TemporaryDirectory() as folder:
        try:
            load = Load(given, Path(folder))
        except FinemoeError as error:
            flags().error(str(error))
        try:
            load.run()
        except KeyboardInterrupt:
            tell("cut short")
        finally:  # a server that fails does not take with it what was measured before
            load.write()
            if any(cell["requests"] for cell in load.report["cells"]):
                print(render(load.report))


if __name__ == "__main__":
    main()
