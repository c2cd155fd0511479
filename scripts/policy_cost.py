"""What a policy costs where it has nothing to do: time per token with every expert in memory, beside another's.

    python scripts/policy_cost.py --prompts FILE [--model FOLDER] [--policies finemoe,lru] [--repeats 10] [--json OUT]

One model is loaded for each policy, in one process. The same prompts go to each by `generate`, greedy, in an order that
changes from round to round; once beforehand, so that all that they need is there.

A ratio is of the same prompt in the same round, against the last policy; shown are medians, and 95% intervals of them
by bootstrap.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from typing import Any

from in_turn import add_arguments, by_generate, cells, heading, parse, prompts_of
from serve_process import align, end_as_by_ctrl_c, tell, write_whole

import finemoe

GOAL = 1.02


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All answers' times."""
    prompts = prompts_of(given)
    names = given.policies.split(",")
    report: dict[str, Any] = {"settings": vars(given), "rows": []}
    begin_s = time.perf_counter()
    with ExitStack() as models:
        loaded = {
            name: models.enter_context(finemoe.load(given.model, expert_memory="all", policy=name, map_store="none"))
            for name in names
        }
        for model in loaded.values():
            for prompt in prompts:  # brings in all that these need
                by_generate(model, prompt, given.new_tokens)
            model.finemoe.reset_stats()
        for turn in range(given.repeats):
            for at, prompt in enumerate(prompts):
                for name in names[:: -1 if (turn + at) % 2 else 1]:
                    row = by_generate(loaded[name], prompt, given.new_tokens)
                    report["rows"].append({"way": name, "round": turn, "prompt": at} | row)
            write_whole(report, given.json)
            tell(f"round {turn + 1} of {given.repeats}")
            if time.perf_counter() - begin_s > given.limit_s:
                tell(f"--limit-s: ends after {turn + 1} rounds")
                break
        report["missed"] = {name: model.finemoe.stats().misses for name, model in loaded.items()}
    return report


def render(report: dict[str, Any]) -> str:
    """A line for each policy."""
    rows, given = report["rows"], report["settings"]
    *names, base = given["policies"].split(",")
    lines = [heading(base), *(cells(rows, name, base) for name in (*names, base))]
    return "\n".join([
        f"model {given['model']}, all experts in memory",
        "",
        align(lines),
        "",
        "x: TPOT, of the same prompt in the same round, median and its 95% interval.",
        f"Missed meanwhile: {', '.join(f'{name} {count}' for name, count in report['missed'].items())}.",
        f"Goal: at most {GOAL:g}.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, prompts=4, tokens=32, new_tokens=24, repeats=10, limit_s=600.0)
    parser.add_argument("--policies", default="finemoe,lru", help="others are compared with the last of them")
    given = parse(parser)
    if given.new_tokens < 2 or len(given.policies.split(",")) < 2:
        parser.error("two policies and two new tokens are the least that can be compared")
    os.environ["FINEMOE_MAPS"] = "none"
    end_as_by_ctrl_c()
    print(render(measure(given)))


if __name__ == "__main__":
    main()
