"""A served model under mixed requests for a long time: does its memory stay flat, and is nothing left in the end?

    python scripts/soak.py --prompts FILE --minutes 60 [--model FOLDER] [--policy finemoe] [--clients 6] [--json OUT]

Clients ask without pause, each time by lot: chats and completions, streamed and whole; several choices; answers that
must fit a JSON schema; log probabilities; requests whose client leaves mid-stream or loses patience, and some that
take longer than the server's `--request-timeout-s`; bad ones. The server is `finemoe serve`'s parts in a process of
their own that, once drained, looks at itself: is a cache block held, an answer known, an expert pinned, does the
pool's bookkeeping hold (`check_integrity`)?

Resident memory is sampled from outside, hits from `/metrics`. Their slopes are of a line through the means of 20 equal
blocks of time after `--warm-up-minutes`, with Student's 95% interval: blocks, as neighbouring samples are alike.
Exit status 1 if anything was lost, or left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
from asking import of_http
from openai import AsyncOpenAI
from serve_process import align, end_as_by_ctrl_c, number, serve_process, tell, write_whole

from finemoe.trace.prompts import read_prompts

BLOCKS = 20
STUDENT = 2.101  # t of 0.975 at BLOCKS - 2 degrees of freedom
ROWS = 10  # of the table over time
WEIGHTS = {
    "chat, streamed": 5, "chat": 3, "completion": 3, "three choices": 1, "json schema": 1, "logprobs": 1,
    "left mid-stream": 2, "lost patience": 2, "too long": 0.3, "bad": 1,
}  # fmt: skip
VERDICT = {
    "type": "object",
    "properties": {"verdict": {"enum": ["yes", "no"]}, "reason": {"type": "string", "maxLength": 40}},
    "required": ["verdict", "reason"],
    "additionalProperties": False,
}
WHOLE: dict[str, dict[str, Any]] = {  # chats that are not streamed, and what they ask for besides
    "chat": {},
    "three choices": {"n": 3},
    "json schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT}}},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "bad": {"extra_body": {"top_k": 4}},
}
EXPECTED = {  # what may become of a request
    "lost patience": {"left", "finished"},
    "left mid-stream": {"left", "finished"},
    "too long": {"timeout", "finished"},
    "bad": {"400"},
}


class Clients:
    """Who asks."""

    def __init__(self, url: str, name: str, texts: Sequence[str], given: argparse.Namespace) -> None:
        self.client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self.name = name
        self.texts = texts
        self.given = given
        self.draw = random.Random(given.seed)
        self.outcomes: Counter[str] = Counter()  # "kind: outcome"
        self.bad: list[str] = []  # what should not have happened

    async def run(self, until_s: float) -> None:
        """Until so late, and then until the last answer has come."""

        async def client() -> None:
            while time.perf_counter() < until_s:
                await self.one()

        async with asyncio.TaskGroup() as group:
            for _ in range(self.given.clients):
                group.create_task(client())
        await self.client.close()

    async def one(self) -> None:
        kind = self.draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        try:
            outcome = await self.ask(kind)
        except openai.APITimeoutError:
            outcome = "left"
        except openai.APIStatusError as error:
            outcome = "timeout" if error.code == "request_timeout" else str(error.status_code)
        except openai.APIError as error:
            outcome = "timeout" if error.code == "request_timeout" else "lost"
        except Exception as error:
            if not of_http(error):
                raise
            outcome = "lost"
        self.outcomes[f"{kind}: {outcome}"] += 1
        if outcome == "429":
            await asyncio.sleep(0.2)
        elif outcome not in EXPECTED.get(kind, {"finished"}):
            self.bad.append(f"{kind}: {outcome}")

    async def ask(self, kind: str) -> str:
        """Returns `finished` or `left`; errors are the client's."""
        prompt = self.draw.choice(self.texts)[: self.given.prompt_characters]
        chat: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": "user", "content": prompt}],
            "max_completion_tokens": self.draw.randint(1, self.given.new_tokens),
            "temperature": self.draw.choice([0, 0.8]),
            "seed": self.draw.randint(0, 99),
        }
        if kind in WHOLE:
            return _whole(await self.client.chat.completions.create(**chat | WHOLE[kind]))
        if kind == "lost patience":
            return _whole(await self.client.chat.completions.create(**chat, timeout=self.draw.uniform(0.01, 1.0)))
        if kind == "completion":
            text: dict[str, Any] = {"model": self.name, "prompt": prompt, "max_tokens": self.given.new_tokens}
            return _whole(await self.client.completions.create(**text))
        if kind == "too long":
            longest = {"max_completion_tokens": self.given.max_output_tokens, "n": 2}
            return _whole(await self.client.chat.completions.create(**chat | longest))
        return await self.stream(chat, self.draw.randint(1, 6) if kind == "left mid-stream" else None)

    async def stream(self, chat: dict[str, Any], leaves_after: int | None) -> str:
        """Leaves after so many chunks, if the answer is not over by then."""
        finish = None
        async with await self.client.chat.completions.create(**chat, stream=True) as stream:
            async for chunk in stream:
                finish = chunk.choices[0].finish_reason
                if leaves_after is not None and (leaves_after := leaves_after - 1) == 0 and not finish:
                    return "left"
        return "finished" if finish else "lost"


def _whole(answer: Any) -> str:
    return "finished" if all(choice.finish_reason for choice in answer.choices) else "lost"


async def sample(
    figures: Callable[[], dict[str, float]], process: psutil.Process, every_s: float, heard: Callable[[Any], None]
) -> None:
    """Looks at the server, until it is cancelled."""
    begin_s = time.perf_counter()
    while True:
        found = await asyncio.to_thread(figures)
        heard(
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
    """Per hour, and half of its 95% interval; `None` of too few."""
    kept = [(t, v) for t, v in zip(times_s, values, strict=True) if v == v]  # noqa: PLR0124 - no NaN
    if len(kept) < 2 * BLOCKS:
        return None
    blocks = [np.mean(block, axis=0) for block in np.array_split(np.array(kept), BLOCKS)]
    hours, means = np.array([t for t, _ in blocks]) / 3600, np.array([v for _, v in blocks])
    centred = hours - hours.mean()
    per_hour = float(centred @ means / (centred @ centred))
    rest = means - means.mean() - per_hour * centred
    error = float(np.sqrt(rest @ rest / (BLOCKS - 2) / (centred @ centred)))
    return per_hour, STUDENT * error


def rates(samples: Sequence[dict[str, float]]) -> list[float]:
    """Hit rate between each sample and the one before; NaN where nothing was accessed."""
    made = [float("nan")]
    for before, after in pairwise(samples):
        accesses = after["accesses"] - before["accesses"]
        made.append((after["hits"] - before["hits"]) / accesses if accesses else float("nan"))
    return made


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Slopes after the warm-up: `rss_mib_per_h`, `hit_points_per_h`, each with half of its interval."""
    samples, warm_s = report["samples"], 60 * report["settings"]["warm_up_minutes"]
    late = [at for at, each in enumerate(samples) if each["at_s"] >= warm_s]
    times_s, hit = [samples[at]["at_s"] for at in late], rates(samples)
    return {
        "rss_mib_per_h": slope(times_s, [samples[at]["rss_mib"] for at in late]),
        "hit_points_per_h": slope(times_s, [100 * hit[at] for at in late]),
    }


def render(report: dict[str, Any]) -> str:
    """What came of it, in some twenty lines."""
    samples, given = report["samples"], report["settings"]
    table = [("minutes", "tokens", "tok/s", "hits", "RSS MiB", "threads", "files", "free blocks")]
    edges = np.linspace(0, len(samples) - 1, min(ROWS, len(samples) - 1) + 1).astype(int)
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
    found = report["summary"]
    lines = [
        f"model {given['model']}, {given['expert_memory']} of the experts, {given['policy']}",
        f"for   {samples[-1]['at_s'] / 60:.1f} minutes, {given['clients']} clients",
        "asked " + ", ".join(f"{what} {count}" for what, count in sorted(report["outcomes"].items())),
        "",
        align(table),
        "",
    ]
    for name, unit in (("rss_mib_per_h", "MiB/h of resident memory"), ("hit_points_per_h", "points/h of hits")):
        text = "too few samples" if found[name] is None else "{:+.2f} ± {:.2f}".format(*found[name])
        lines.append(f"slope {text} {unit}, after {given['warm_up_minutes']:g} minutes, 95%")
    lines += [f"end   {json.dumps(report['end'])}", f"bad   {report['bad'][:5] or 'nothing'}"]
    return "\n".join(lines)


def serve(arguments: Sequence[str]) -> None:
    """The server's process: its flags are those of `finemoe serve`."""
    from serve_here import server_parts

    from finemoe.cli.flags import add_flags, read_flags
    from finemoe.config import LoadConfig
    from finemoe.model import load_config
    from finemoe.serving.config import ServeConfig
    from finemoe.serving.middleware import log_to_stderr
    from finemoe.system import return_freed_memory, unmap_idle_code

    return_freed_memory()
    parser = argparse.ArgumentParser()
    add_flags(parser, LoadConfig)
    add_flags(parser, ServeConfig)
    flags = parser.parse_args(arguments)
    log_to_stderr()
    with load_config(read_flags(flags, LoadConfig)) as model:
        with server_parts(model, read_flags(flags, ServeConfig)) as parts:
            unmap_idle_code()
            name = parts.app_state.served.name
            parts.server.run(parts.taken, lambda: print(f"{name} at {parts.url}", flush=True))
            load, failure = parts.worker.load(), parts.worker.failure()
        pinned = int(model.finemoe.experts().pinned.sum())
        try:
            model.finemoe.check_integrity()
            integrity = "holds"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            integrity = str(error)
    end = {
        "running": load.running,
        "waiting": load.waiting,
        "held_blocks": load.cache_blocks - load.free_cache_blocks,
        "pinned": pinned,
        "integrity": integrity,
        "failure": failure,
    }
    print(json.dumps(end), flush=True)


def sound(end: dict[str, Any] | None) -> bool:
    """Whether a server that has ended left nothing."""
    if end is None or end["integrity"] != "holds" or end["failure"] is not None:
        return False
    return not any(end[name] for name in ("running", "waiting", "held_blocks", "pinned"))


def soak(given: argparse.Namespace) -> dict[str, Any]:
    """Runs it; the report."""
    texts = read_prompts(Path(given.prompts)).texts
    report: dict[str, Any] = {"settings": vars(given), "samples": [], "outcomes": {}, "bad": [], "end": None}
    flags = ["--model", given.model, "--policy", given.policy, "--expert-memory", given.expert_memory]
    flags += ["--request-timeout-s", str(given.request_timeout_s), "--cache-bytes", given.cache_bytes]
    flags += ["--max-output-tokens", str(given.max_output_tokens)]

    async def run(url: str, name: str, pid: int, figures: Callable[[], dict[str, float]]) -> None:
        clients = Clients(url, name, texts, given)

        def heard(found: dict[str, float]) -> None:
            report["samples"].append(found)
            report.update(outcomes=dict(clients.outcomes), bad=clients.bad, summary=summary(report))
            write_whole(report, given.json)
            if len(report["samples"]) % 12 == 1:
                tell(
                    f"{found['at_s'] / 60:.1f} min, {sum(clients.outcomes.values())} asked, {found['rss_mib']:.1f} MiB"
                )

        sampling = asyncio.create_task(sample(figures, psutil.Process(pid), given.sample_s, heard))
        try:
            await clients.run(time.perf_counter() + 60 * given.minutes)
        finally:
            sampling.cancel()
            report.update(outcomes=dict(clients.outcomes), bad=clients.bad)

    with serve_process(flags, (str(Path(__file__).resolve()), "--serve")) as server:
        try:
            asyncio.run(run(server.url, server.name, server.pid, server.figures))
        except KeyboardInterrupt:
            tell("cut short")
    lines = [line for line in server.said if line.startswith("{")]
    report |= {"end": json.loads(lines[-1]) if lines else None, "summary": summary(report)}
    return report


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="a file as for finemoe record")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up-minutes", type=float, help="not counted in slopes (default: a third, 10 at most)")
    parser.add_argument("--model", help="folder (default: the reference model)")
    parser.add_argument("--policy", default="finemoe")
    parser.add_argument("--expert-memory", default="25%")
    parser.add_argument("--cache-bytes", default="256MiB")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--prompt-characters", type=int, default=200, help="prompts are cut to so many")
    parser.add_argument("--new-tokens", type=int, default=24, help="the most that an answer asks for")
    parser.add_argument("--max-output-tokens", type=int, default=512, help="but for those that take too long")
    parser.add_argument("--request-timeout-s", type=float, default=30.0, help="the server's")
    parser.add_argument("--sample-s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="OUT", help="write samples and outcomes here, as they come")
    given = parser.parse_args()
    if given.warm_up_minutes is None:
        given.warm_up_minutes = min(10.0, given.minutes / 3)
    if given.model is None:
        from finemoe.model import reference_model

        given.model = str(reference_model())
    os.environ["FINEMOE_MAPS"] = "none"
    end_as_by_ctrl_c()
    report = soak(given)
    write_whole(report, given.json)
    if len(report["samples"]) > 1:
        print(render(report))
    return 0 if sound(report["end"]) and not report["bad"] else 1


if __name__ == "__main__":
    sys.exit(main())
