"""Throughput by the number of closed-loop clients, of a server that batches and of one that runs one answer at a time.

Policies learn, so each row has a server of its own with nothing learned.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from statistics import median
from typing import Any

from finemoe.bench.serve.client import Client, RequestOutcome, TimedRequest, closed_loop
from finemoe.bench.serve.config import ConcurrencyConfig
from finemoe.bench.serve.scenario import Scenario, log, number, prompt_ids
from finemoe.bench.serve.server import expert_metrics, serve_process
from finemoe.bench.table import align
from finemoe.errors import BenchmarkError

ALONE, BATCHED = "one at a time", "server"
LATENCIES = ("ttft_s", "tpot_s")


class Concurrency(Scenario):
    """The benchmark; see `Scenario`. The document's `rows` are one server each."""

    def __init__(self, config: ConcurrencyConfig, out: Path | None = None) -> None:
        super().__init__(config, out)
        self.config = config
        ids = prompt_ids(self.folder, config.prompts, config.requests, config.prompt_tokens, config.seed)
        self._requests = [TimedRequest(prompt, config.new_tokens) for prompt in ids]
        self.document |= {"rows": [], "left_out": []}

    @property
    def measured(self) -> bool:
        return bool(self.document["rows"])

    def run(self) -> None:
        for repeat in range(self.config.repeats):
            for clients in self.config.counts:
                for how in (ALONE, BATCHED):
                    if self.elapsed_s > self.config.limit_s:
                        self.document["left_out"].append(f"{how} {clients}, repeat {repeat + 1}")
                        continue
                    row = self._measure(how, clients)
                    self.document["rows"].append(row | {"repeat": repeat})
                    log(f"{how}, {clients} clients: {row['tok_s']:.2f} tok/s")
                    self.write()

    def _measure(self, how: str, clients: int) -> dict[str, Any]:
        requests, running = self._requests, 1 if how == ALONE else max(self.config.counts)
        limits = ["--max-running", str(running), "--max-waiting", str(max(64, clients))]

        async def measure(url: str, name: str) -> tuple[list[RequestOutcome], float, dict[str, float]]:
            async with Client(url, name, chat=False) as client:
                await client.send(TimedRequest(requests[-1].prompt, 2))  # a server's first pass is slower
                before = server.metrics()
                outcomes, total_s = await closed_loop(client, requests, clients)
            return outcomes, total_s, before

        with serve_process([*self.server_flags(self.config.policy), *limits]) as server:
            outcomes, total_s, before = asyncio.run(measure(server.url, server.name))
            experts = expert_metrics(before, server.metrics())
        if failed := [outcome for outcome in outcomes if outcome.status != "finished"]:
            raise BenchmarkError(f"a request was not finished, but {failed[0].status} ({failed[0].message})")
        tokens = sum(outcome.tokens for outcome in outcomes)
        latencies = {name: [s for each in outcomes if (s := getattr(each, name)) is not None] for name in LATENCIES}
        return {
            "how": how,
            "concurrent": clients,
            "batched": running > 1,
            "total_s": total_s,
            "tokens": tokens,
            "tok_s": tokens / total_s,
            **{f"{name}_p50": median(values) if values else None for name, values in latencies.items()},
            **{name: experts[name] for name in ("hit_rate", "stall_s", "bytes_read")},
        }

    def table(self) -> str:
        given = self.document["settings"]
        lines = [
            f"model {given['model']}, {given['expert_memory']} of the experts, {given['policy']}",
            "",
            render(self.document["rows"]),
            "",
            "Medians over repeats. x: throughput, of that of one at a time with as many clients.",
        ]
        if self.document["left_out"]:
            lines.append(f"Left out, --limit-s: {', '.join(self.document['left_out'])}.")
        return "\n".join(lines)


def render(rows: list[dict[str, Any]]) -> str:
    """A line for each kind of server and number of clients."""
    shares = [
        row | {"stall_share": row["stall_s"] / row["total_s"], "mib": row["bytes_read"] / row["tokens"] / (1 << 20)}
        for row in rows
    ]

    def middle(how: str, clients: int, name: str) -> float | None:
        same = [row[name] for row in shares if (row["how"], row["concurrent"]) == (how, clients)]
        values = [value for value in same if value is not None]
        return median(values) if values else None

    lines = [("", "clients", "tok/s", "x", "TTFT p50 s", "TPOT p50 ms", "hits", "MiB/tok", "stall")]
    for how, clients in dict.fromkeys((row["how"], row["concurrent"]) for row in rows):
        tok_s, base = middle(how, clients, "tok_s"), middle(ALONE, clients, "tok_s")
        lines.append((
            how, str(clients), number(tok_s, ".2f"), number(tok_s / base if tok_s and base else None, ".2f"),
            number(middle(how, clients, "ttft_s_p50"), ".2f"),
            number(middle(how, clients, "tpot_s_p50"), ".0f", 1000),
            number(middle(how, clients, "hit_rate"), ".1%"), number(middle(how, clients, "mib"), ".1f"),
            number(middle(how, clients, "stall_share"), ".0%"),
        ))  # fmt: skip
    return "\n".join(align(lines))
