"""Where a token's time goes on the model's thread: the experts' arithmetic, waiting, and what finemoe itself does.

    GOMP_SPINCOUNT=5000 python scripts/where_time_goes.py [--prompts FILE] [--model FOLDER]
        [--expert-memory 25%] [--policy finemoe] [--json OUT]

Greedy answers to the same prompts, round after round; the first round is not counted, nor is a prompt's own pass.
Clocks are put around the functions that a layer runs through, so a part's time includes what its core was taken for
meanwhile, and the clocks themselves: some 1% of a small model's token. What is left is the model's own: attention,
norms, the head, and what is around the experts in their block. The environment is that which commands have.

    per layer     listening: what the gate said, and the gates ahead; routing: books what the layer needs, tells the
                  policy, sends for what is missing; rows: whose tokens are whose
    per expert    handing out: slots to the layer and back to the cache; parameters: finding a slot's tensors
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from in_turn import add_arguments, parse, prompts_of
from serve_process import align, end_as_by_ctrl_c, write_whole
from transformers.generation.streamers import BaseStreamer

import finemoe
from finemoe.engine import expert_layer as experts
from finemoe.engine.engine import Engine
from finemoe.engine.expert_layer import ExpertLayer
from finemoe.model.observer import Observer

PARTS = {
    "arithmetic": "experts' arithmetic",
    "waiting": "waiting for experts",
    "listening": "per layer: listening",
    "routing": "per layer: routing",
    "rows": "per layer: rows",
    "handing out": "per expert: handing out",
    "parameters": "per expert: parameters",
}
AROUND: list[tuple[str, Any, str]] = [
    ("arithmetic", experts, "apply_expert"),
    ("rows", experts, "dispatch_tokens"),
    ("listening", ExpertLayer, "_observe_gates"),
    ("parameters", ExpertLayer, "parameters"),
    ("routing", Engine, "_route"),
    ("waiting", Engine, "_wait"),
]
LISTENER = "_on_router"  # of Observer: makes what a gate calls


class Clocks:
    """Seconds of each part, without those of the parts inside it."""

    def __init__(self) -> None:
        self.spent_s: Counter[str] = Counter()
        self._inside_s: list[float] = []  # of what is being timed, what the parts inside it took

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            return self._time(part, lambda: function(*arguments, **keywords))

        return timed

    def around_steps(self, part: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """For a generator: its steps, not what is done between them."""

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
        self._inside_s.append(0.0)
        start_s = time.perf_counter()
        try:
            return work()
        finally:
            took_s = time.perf_counter() - start_s
            self.spent_s[part] += took_s - self._inside_s.pop()
            if self._inside_s:
                self._inside_s[-1] += took_s


def put_on(clocks: Clocks) -> None:
    """Puts clocks around everything, before a model is loaded."""
    for part, owner, name in AROUND:
        setattr(owner, name, clocks.around(part, getattr(owner, name)))
    listener: Callable[..., Any] = getattr(Observer, LISTENER)
    setattr(Observer, LISTENER, lambda *given: clocks.around("listening", listener(*given)))
    Engine.serve = clocks.around_steps("handing out", Engine.serve)  # type: ignore[method-assign]


class Decoding(BaseStreamer):
    """Notes when the first and the latest token came; from the first on, the clocks count."""

    def __init__(self, clocks: Clocks) -> None:
        self._clocks = clocks
        self.tokens = -1  # the prompt is told first
        self.first_s = self.last_s = 0.0

    def put(self, _value: torch.Tensor) -> None:
        self.tokens += 1
        self.last_s = time.perf_counter()
        if self.tokens == 1:
            self.first_s = self.last_s
            self._clocks.spent_s.clear()

    def end(self) -> None: ...


def decode(model: Any, prompt: list[int], new_tokens: int, clocks: Clocks) -> tuple[int, float]:
    """Tokens after the first, and their time; the clocks show its parts."""
    ids, decoding = torch.tensor([prompt]), Decoding(clocks)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, top_p=None, top_k=None,
        max_new_tokens=new_tokens, min_new_tokens=2, pad_token_id=0, streamer=decoding,
    )  # fmt: skip
    return decoding.tokens - 1, decoding.last_s - decoding.first_s


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All rounds' parts."""
    clocks, prompts = Clocks(), prompts_of(given)
    put_on(clocks)
    report: dict[str, Any] = {"settings": vars(given), "rounds": []}
    begin_s = time.perf_counter()
    with finemoe.load(
        given.model, device="cpu", expert_memory=given.expert_memory, policy=given.policy, map_store="none"
    ) as model:
        for turn in range(given.repeats + 1):
            spent_s, total_s, tokens = Counter[str](), 0.0, 0
            model.finemoe.reset_stats()
            for prompt in prompts:
                count, took_s = decode(model, prompt, given.new_tokens, clocks)
                spent_s += clocks.spent_s
                tokens, total_s = tokens + count, total_s + took_s
            hit_rate = model.finemoe.stats().hit_rate
            if turn:
                of_round = {"tokens": tokens, "total_s": total_s, "hit_rate": hit_rate, "parts_s": dict(spent_s)}
                report["rounds"].append(of_round)
                write_whole(report, given.json)
            if turn and time.perf_counter() - begin_s > given.limit_s:
                break
    return report


def render(report: dict[str, Any]) -> str:
    """A line for each part."""
    rounds, given = report["rounds"], report["settings"]
    tokens, total_s = (sum(each[name] for each in rounds) for name in ("tokens", "total_s"))
    parts_s = {name: sum(each["parts_s"].get(name, 0.0) for each in rounds) for name in PARTS}
    parts = [(PARTS[name], spent_s) for name, spent_s in parts_s.items()]
    parts += [("the model's own", total_s - sum(parts_s.values())), ("a token", total_s)]
    lines = [(name, f"{1000 * spent_s / tokens:.2f}", f"{spent_s / total_s:.1%}") for name, spent_s in parts]
    hit_rate = sum(each["hit_rate"] for each in rounds) / len(rounds)
    what = f"model {given['model']}, {given['expert_memory']} of the experts, policy {given['policy']}"
    return "\n".join([
        f"{what}: {hit_rate:.1%} hits",
        "",
        align([("", "ms", "share"), *lines]),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, prompts=4, tokens=32, new_tokens=48, repeats=3, limit_s=300.0, drawn=True)
    parser.add_argument("--expert-memory", default="25%")
    parser.add_argument("--policy", default="finemoe")
    given = parse(parser)
    if given.new_tokens < 2:
        parser.error("--new-tokens: a token's time takes two")
    os.environ["FINEMOE_MAPS"] = "none"
    end_as_by_ctrl_c()
    print(render(measure(given)))


if __name__ == "__main__":
    main()
