"""Profiles a decoded token on the model's thread: expert arithmetic, waiting for experts, and finemoe's own work.

    GOMP_SPINCOUNT=5000 python scripts/where_time_goes.py [--prompts FILE] [--model FOLDER]
        [--expert-memory 25%] [--policy finemoe] [--json OUT]

Greedy answers to the same prompts, round after round; the first round and each prompt's prefill are not counted.
Timers wrap the functions that a layer calls, so a part includes preemption, and the timers themselves cost some 1% of a
small model's token. The rest is the model's own: attention, norms, the head, and the router. `GOMP_SPINCOUNT` is what
finemoe's commands set.

    per layer     listening: router hooks and gate lookahead; routing: cache bookkeeping, policy, submitting reads;
                  rows: which tokens go to which expert
    per expert    handing out: expert slots to the layer and back; parameters: tensors of a slot
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

import finemoe
from finemoe.bench.serve.scenario import prompt_ids
from finemoe.bench.table import align
from finemoe.checkpoint import locate
from finemoe.engine import expert_layer as experts
from finemoe.engine.engine import Engine
from finemoe.engine.expert_layer import ExpertLayer
from finemoe.model import chosen_model
from finemoe.model.observer import Observer
from finemoe.system import replace_file

PARTS = {  # key in the JSON document -> line of the table
    "arithmetic": "expert arithmetic",
    "waiting": "waiting for experts",
    "listening": "per layer: router hooks",
    "routing": "per layer: routing",
    "rows": "per layer: token dispatch",
    "handing out": "per expert: slots",
    "parameters": "per expert: parameters",
}
TIMED: list[tuple[str, Any, str]] = [  # part, owner and name of each function with a timer
    ("arithmetic", experts, "apply_expert"),
    ("rows", experts, "dispatch_tokens"),
    ("listening", ExpertLayer, "_observe_gates"),
    ("parameters", ExpertLayer, "parameters"),
    ("routing", Engine, "_route"),
    ("waiting", Engine, "_wait"),
]
ROUTER_HOOK = "_on_router"  # of Observer: makes the hook of a router


class Timers:
    """Seconds of each part, without those of parts nested in it."""

    def __init__(self) -> None:
        self.spent_s: Counter[str] = Counter()
        self._nested_s: list[float] = []  # of each running timer, the time of those nested in it

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Times a function's calls."""

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            return self._time(part, lambda: function(*arguments, **keywords))

        return timed

    def wrap_generator(self, part: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Times a generator's steps, not what its caller does between them."""

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Iterator[Any]:
            steps, end = function(*arguments, **keywords), object()
            try:
                while (step := self._time(part, lambda: next(steps, end))) is not end:
                    yield step
            finally:
                steps.close()  # type: ignore[attr-defined]

        return timed

    def _time(self, part: str, work: Callable[[], Any]) -> Any:
        self._nested_s.append(0.0)
        start_s = time.perf_counter()
        try:
            return work()
        finally:
            took_s = time.perf_counter() - start_s
            self.spent_s[part] += took_s - self._nested_s.pop()
            if self._nested_s:
                self._nested_s[-1] += took_s


def install(timers: Timers) -> None:
    """Wraps everything that is timed. Call it before a model is loaded."""
    for part, owner, name in TIMED:
        setattr(owner, name, timers.wrap(part, getattr(owner, name)))
    make_hook: Callable[..., Any] = getattr(Observer, ROUTER_HOOK)
    setattr(Observer, ROUTER_HOOK, lambda *given: timers.wrap("listening", make_hook(*given)))
    Engine.serve = timers.wrap_generator("handing out", Engine.serve)  # type: ignore[method-assign]


class DecodeTimes(BaseStreamer):
    """Notes when the first and the latest token arrive, and resets the timers at the first."""

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self.tokens = -1  # `generate` puts the prompt first
        self.first_s = self.last_s = 0.0

    def put(self, _value: torch.Tensor) -> None:
        self.tokens += 1
        self.last_s = time.perf_counter()
        if self.tokens == 1:
            self.first_s = self.last_s
            self._timers.spent_s.clear()

    def end(self) -> None: ...


def decode(model: Any, prompt: list[int], new_tokens: int, timers: Timers) -> tuple[int, float]:
    """Number of tokens after the first, and their seconds; the timers hold the parts."""
    ids, times = torch.tensor([prompt]), DecodeTimes(timers)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, top_p=None, top_k=None,
        max_new_tokens=new_tokens, min_new_tokens=2, pad_token_id=0, streamer=times,
    )  # fmt: skip
    return times.tokens - 1, times.last_s - times.first_s


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """The parts of all rounds."""
    folder, timers = locate(given.model).folder, Timers()
    prompts = prompt_ids(folder, given.prompts, given.prompts_limit, given.prompt_tokens)
    install(timers)
    document: dict[str, Any] = {"settings": vars(given), "rounds": []}
    begin_s = time.perf_counter()
    with finemoe.load(
        folder, device="cpu", expert_memory=given.expert_memory, policy=given.policy, map_store="none"
    ) as model:
        for turn in range(given.repeats + 1):
            spent_s, total_s, tokens = Counter[str](), 0.0, 0
            model.finemoe.reset_stats()
            for prompt in prompts:
                count, took_s = decode(model, prompt, given.new_tokens, timers)
                spent_s += timers.spent_s
                tokens, total_s = tokens + count, total_s + took_s
            hit_rate = model.finemoe.stats().hit_rate
            if turn:
                document["rounds"].append(
                    {"tokens": tokens, "total_s": total_s, "hit_rate": hit_rate, "parts_s": dict(spent_s)}
                )
                if given.json is not None:
                    replace_file(given.json, json.dumps(document, indent=1, default=str).encode())
            if turn and time.perf_counter() - begin_s > given.limit_s:
                break
    return document


def render(document: dict[str, Any]) -> str:
    """A line for each part."""
    rounds, given = document["rounds"], document["settings"]
    tokens, total_s = (sum(each[name] for each in rounds) for name in ("tokens", "total_s"))
    parts_s = {name: sum(each["parts_s"].get(name, 0.0) for each in rounds) for name in PARTS}
    parts = [(PARTS[name], spent_s) for name, spent_s in parts_s.items()]
    parts += [("the model's own", total_s - sum(parts_s.values())), ("a token", total_s)]
    lines = [(name, f"{1000 * spent_s / tokens:.2f}", f"{spent_s / total_s:.1%}") for name, spent_s in parts]
    hit_rate = sum(each["hit_rate"] for each in rounds) / len(rounds)
    what = f"model {given['model']}, {given['expert_memory']} of the experts, policy {given['policy']}"
    return "\n".join([f"{what}: {hit_rate:.1%} hits", "", *align([("", "ms", "share"), *lines])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", help="a file as for finemoe record; without, random tokens")
    parser.add_argument("--prompts-limit", type=int, default=4)
    parser.add_argument("--model", help="folder or hub id (default: the reference model)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="prompts are cut to this length")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--expert-memory", default="25%")
    parser.add_argument("--policy", default="finemoe")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are counted")
    parser.add_argument("--limit-s", type=float, default=300.0, help="start no round after this many seconds")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rounds here, as they end")
    given = parser.parse_args()
    if given.new_tokens < 2:
        parser.error("--new-tokens: TPOT needs at least 2")
    given.model = chosen_model(given.model)
    os.environ["FINEMOE_MAPS"] = "none"
    print(render(measure(given)))


if __name__ == "__main__":
    main()
