"""A served model under mixed requests for a long time: whether its memory stays flat, and whether anything is left.

Clients send chats and completions, streamed or not; several choices; answers that must fit a JSON schema; log
probabilities; invalid requests; requests whose client disconnects mid-stream or times out, and some that take longer
than the server's `--request-timeout-s`. Once drained, the server inspects itself; see `serve_and_inspect`.

Resident memory is sampled from outside, hits from `/metrics`. A slope is that of a line through the means of 20 equal
blocks of time after the warm-up, since neighbouring samples are correlated; with Student's 95% interval.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
from openai import AsyncOpenAI

from finemoe.bench.serve.client import is_http_error
from finemoe.bench.serve.config import SoakConfig
from finemoe.bench.serve.scenario import Scenario, log, number
from finemoe.bench.serve.server import ServerProcess, inspected_process
from finemoe.bench.table import align
from finemoe.serving.config import ServeConfig
from finemoe.trace.prompts import read_prompts

BLOCKS = 20
STUDENT = 2.101  # t of 0.975 at BLOCKS - 2 degrees of freedom
TABLE_ROWS = 10
WEIGHTS = {  # of each kind of request
    "chat, streamed": 5, "chat": 3, "completion": 3, "three choices": 1, "json schema": 1, "logprobs": 1,
    "left mid-stream": 2, "lost patience": 2, "too long": 0.3, "bad": 1,
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"enum": ["yes", "no"]}, "reason": {"type": "string", "maxLength": 40}},
    "required": ["verdict", "reason"],
    "additionalProperties": False,
}
UNSTREAMED: dict[str, dict[str, Any]] = {  # kinds of chats, and their further parameters
    "chat": {},
    "three choices": {"n": 3},
    "json schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}}},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "bad": {"extra_body": {"top_k": 4}},
}
EXPECTED = {  # outcomes of the kinds that need not finish
    "lost patience": {"left", "finished"},
    "left mid-stream": {"left", "finished"},
    "too long": {"timeout", "finished"},
    "bad": {"400"},
}


class Soak(Scenario):
    """The benchmark; see `Scenario`.

    The document's `samples` are the server's state over time, `outcomes` counts `kind: outcome`, `bad` lists those that
    should not have happened, `summary` has the slopes, and `end` is what the server found once it had drained.
    """

    def __init__(self, config: SoakConfig, out: Path | None = None) -> None:
        super().__init__(config, out)
        assert config.prompts is not None  # checked by the config
        self.config = config
        self._prompts = read_prompts(Path(config.prompts)).texts
        self.document |= {"samples": [], "outcomes": {}, "bad": [], "summary": None, "end": None}

    @property
    def measured(self) -> bool:
        return len(self.document["samples"]) > 1

    @property
    def failed(self) -> bool:
        return bool(self.document["bad"]) or not is_clean(self.document["end"])

    def run(self) -> None:
        config, document = self.config, self.document
        server_config = ServeConfig(
            cache_bytes=config.cache_bytes,
            max_output_tokens=config.max_output_tokens,
            request_timeout_s=config.request_timeout_s,
        )
        with inspected_process(self.load_config(), server_config) as server:
            try:
                asyncio.run(self._soak(server))
            except KeyboardInterrupt:
                log("interrupted")
        reported = [line for line in server.output if line.startswith("{")]
        document["end"] = json.loads(reported[-1]) if reported else None
        document["summary"] = summarise(document["samples"], config.warm_up_s)

    async def _soak(self, server: ServerProcess) -> None:
        clients, document = MixedClients(server, self._prompts, self.config), self.document

        def on_sample(found: dict[str, float]) -> None:
            document["samples"].append(found)
            document["outcomes"], document["bad"] = dict(clients.outcomes), clients.bad
            document["summary"] = summarise(document["samples"], self.config.warm_up_s)
            self.write()
            if len(document["samples"]) % 12 == 1:
                sent = sum(clients.outcomes.values())
                log(f"{found['at_s'] / 60:.1f} min, {sent} requests, {found['rss_mib']:.1f} MiB")

        sampling = asyncio.create_task(sample(server, self.config.sample_s, on_sample))
        try:
            await clients.run(time.perf_counter() + 60 * self.config.minutes)
        finally:
            sampling.cancel()
            document["outcomes"], document["bad"] = dict(clients.outcomes), clients.bad

    def table(self) -> str:
        return render(self.document, self.config.warm_up_s)


class MixedClients:
    """Closed-loop clients that draw the kind of each request.

    Args:
        server: to send to.
        prompts: texts.
        config: of the soak.
    """

    def __init__(self, server: ServerProcess, prompts: Sequence[str], config: SoakConfig) -> None:
        self.outcomes: Counter[str] = Counter()  # by "kind: outcome"
        self.bad: list[str] = []  # outcomes that should not have happened
        self._client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)
        self._model = server.name
        self._prompts = prompts
        self._config = config
        self._draw = random.Random(config.seed)  # noqa: S311 - chooses requests

    async def run(self, until_s: float) -> None:
        """Starts requests until then, by `time.perf_counter`; returns when all have ended."""

        async def client() -> None:
            while time.perf_counter() < until_s:
                await self._one()

        async with asyncio.TaskGroup() as group:
            for _ in range(self._config.clients):
                group.create_task(client())
        await self._client.close()

    async def _one(self) -> None:
        kind = self._draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        try:
            outcome = await self._send(kind)
        except openai.APITimeoutError:
            outcome = "left"
        except openai.APIStatusError as error:
            outcome = "timeout" if error.code == "request_timeout" else str(error.status_code)
        except openai.APIError as error:
            outcome = "timeout" if error.code == "request_timeout" else "lost"
        except Exception as error:
            if not is_http_error(error):
                raise
            outcome = "lost"
        self.outcomes[f"{kind}: {outcome}"] += 1
        if outcome == "429":
            await asyncio.sleep(0.2)
        elif outcome not in EXPECTED.get(kind, {"finished"}):
            self.bad.append(f"{kind}: {outcome}")

    async def _send(self, kind: str) -> str:
        """Returns `finished`, `lost` (an answer without an end) or `left` (the client disconnected)."""
        draw, config = self._draw, self._config
        prompt = draw.choice(self._prompts)[: config.prompt_characters]
        chat: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_completion_tokens": draw.randint(1, config.new_tokens),
            "temperature": draw.choice([0, 0.8]),
            "seed": draw.randint(0, 99),
        }
        completions: Any = self._client.chat.completions
        if kind in UNSTREAMED:
            return _outcome(await completions.create(**chat | UNSTREAMED[kind]))
        if kind == "lost patience":
            return _outcome(await completions.create(**chat, timeout=draw.uniform(0.01, 1.0)))
        if kind == "completion":
            options = {"model": self._model, "prompt": prompt, "max_tokens": config.new_tokens}
            texts: Any = self._client.completions
            return _outcome(await texts.create(**options))
        if kind == "too long":
            longest = {"max_completion_tokens": config.max_output_tokens, "n": 2}
            return _outcome(await completions.create(**chat | longest))
        chunks = draw.randint(1, 6) if kind == "left mid-stream" else None
        return await _read_stream(await completions.create(**chat, stream=True), chunks)


def _outcome(answer: Any) -> str:
    return "finished" if all(choice.finish_reason for choice in answer.choices) else "lost"


async def _read_stream(stream: Any, chunks: int | None) -> str:
    """Reads a stream; disconnects after so many chunks, if it has not finished by then."""
    finish = None
    async with stream:
        async for chunk in stream:
            finish = chunk.choices[0].finish_reason
            if chunks is not None and (chunks := chunks - 1) == 0 and not finish:
                return "left"
    return "finished" if finish else "lost"


async def sample(server: ServerProcess, every_s: float, on_sample: Callable[[dict[str, float]], None]) -> None:
    """Samples a server's process and metrics until it is cancelled."""
    begin_s, process = time.perf_counter(), psutil.Process(server.pid)
    while True:
        found = await asyncio.to_thread(server.metrics)
        on_sample(
            {
                "at_s": time.perf_counter() - begin_s,
                "rss_mib": process.memory_info().rss / (1 << 20),
                "threads": process.num_threads(),
                "open_files": process.num_fds(),
                "accesses": sum(found.get(f"finemoe_expert_accesses_total/{r}", 0) for r in ("hit", "late", "miss")),
                "hits": found.get("finemoe_expert_accesses_total/hit", 0.0),
                "tokens": found.get("finemoe_generated_tokens_total", 0.0),
                "free_blocks": found.get("finemoe_cache_blocks_free", 0.0),
            }
        )
        await asyncio.sleep(every_s)


def slope(times_s: Sequence[float], values: Sequence[float]) -> tuple[float, float] | None:
    """Change per hour, and the half-width of its 95% interval; NaN is left out; `None` for too few values."""
    kept = [(t, v) for t, v in zip(times_s, values, strict=True) if not np.isnan(v)]
    if len(kept) < 2 * BLOCKS:
        return None
    blocks = [np.mean(block, axis=0) for block in np.array_split(np.array(kept), BLOCKS)]
    hours, means = np.array([t for t, _ in blocks]) / 3600, np.array([v for _, v in blocks])
    centred = hours - hours.mean()
    per_hour = float(centred @ means / (centred @ centred))
    residual = means - means.mean() - per_hour * centred
    error = float(np.sqrt(residual @ residual / (BLOCKS - 2) / (centred @ centred)))
    return per_hour, STUDENT * error


def hit_rates(samples: Sequence[dict[str, float]]) -> list[float]:
    """Hit rate between each sample and the one before; NaN for the first, and where nothing was accessed."""
    rates = [float("nan")]
    for before, after in pairwise(samples):
        accesses = after["accesses"] - before["accesses"]
        rates.append((after["hits"] - before["hits"]) / accesses if accesses else float("nan"))
    return rates


def summarise(samples: Sequence[dict[str, float]], warm_up_s: float) -> dict[str, Any]:
    """Slopes after the warm-up: `rss_mib_per_h`, `hit_points_per_h`, each with the half-width of its interval."""
    late = [n for n, each in enumerate(samples) if each["at_s"] >= warm_up_s]
    times_s, hits = [samples[n]["at_s"] for n in late], hit_rates(samples)
    return {
        "rss_mib_per_h": slope(times_s, [samples[n]["rss_mib"] for n in late]),
        "hit_points_per_h": slope(times_s, [100 * hits[n] for n in late]),
    }


def is_clean(end: dict[str, Any] | None) -> bool:
    """Whether a server that has drained holds nothing, and is intact."""
    if end is None or end["integrity"] != "holds" or end["failure"] is not None:
        return False
    return not any(end[name] for name in ("running", "waiting", "held_blocks", "pinned"))


def render(document: dict[str, Any], warm_up_s: float) -> str:
    """The document in some twenty lines."""
    samples, given = document["samples"], document["settings"]
    table = [("minutes", "tokens", "tok/s", "hits", "RSS MiB", "threads", "files", "free blocks")]
    edges = np.linspace(0, len(samples) - 1, min(TABLE_ROWS, len(samples) - 1) + 1).astype(int)
    for low, high in pairwise(edges):
        before, after = samples[low], samples[high]
        tokens, accesses = after["tokens"] - before["tokens"], after["accesses"] - before["accesses"]
        table.append((
            f"{before['at_s'] / 60:.1f} to {after['at_s'] / 60:.1f}", f"{tokens:.0f}",
            number(tokens / (after["at_s"] - before["at_s"]), ".1f"),
            number((after["hits"] - before["hits"]) / accesses if accesses else None, ".1%"),
            number(after["rss_mib"], ".1f"), f"{after['threads']:.0f}", f"{after['open_files']:.0f}",
            f"{after['free_blocks']:.0f}",
        ))  # fmt: skip
    lines = [
        f"model     {given['model']}, {given['expert_memory']} of the experts, {given['policy']}",
        f"duration  {samples[-1]['at_s'] / 60:.1f} minutes, {given['clients']} clients",
        "requests  " + ", ".join(f"{what} {count}" for what, count in sorted(document["outcomes"].items())),
        "",
        *align(table),
        "",
    ]
    for name, unit in (("rss_mib_per_h", "MiB/h of resident memory"), ("hit_points_per_h", "points/h of hits")):
        found = document["summary"][name]
        text = "too few samples" if found is None else "{:+.2f} ± {:.2f}".format(*found)
        lines.append(f"slope     {text} {unit}, after {warm_up_s / 60:.3g} minutes, 95%")
    lines += [f"end       {json.dumps(document['end'])}", f"bad       {document['bad'][:5] or 'nothing'}"]
    return "\n".join(lines)
