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
from pathlib import Path
from statistics import median
from typing import Any

from overhead import by_generate, interval, ratios
from serve_process import align, end_as_by_ctrl_c, number, tell, write_whole
from transformers import AutoTokenizer

import finemoe
from finemoe.trace.prompts import read_prompts

GOAL = 1.02


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All answers' times."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = read_prompts(Path(given.prompts), limit=given.prompts_limit).texts
    prompts = [tokenizer(text)["input_ids"][: given.prompt_tokens] for text in texts]
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
    lines = [("", "answers", "TTFT p50 ms", "TPOT p50 ms", f"x {base}")]
    for name in (*names, base):
        own = [row for row in rows if row["way"] == name]
        ttft_s = median(row["ttft_s"] for row in own)
        tpot_s = [row["tpot_s"] for row in own if "tpot_s" in row]  # of a single token there is none
        found = ratios(rows, name, base) if name != base else []
        low, high = interval(found) if found else (0.0, 0.0)
        x = f"{median(found):.3f} ({low:.3f} to {high:.3f})" if found else "-"
        tpot = number(median(tpot_s) if tpot_s else None, ".2f", 1000)
        lines.append((name, str(len(own)), number(ttft_s, ".1f", 1000), tpot, x))
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
    parser.add_argument("--prompts", required=True, help="a file as for finemoe record")
    parser.add_argument("--prompts-limit", type=int, default=4)
    parser.add_argument("--model", help="folder (default: the reference model)")
    parser.add_argument("--policies", default="finemoe,lru", help="others are compared with the last of them")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="prompts are cut to so many")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=10, help="rounds")
    parser.add_argument("--limit-s", type=float, default=600.0, help="begin no round after so many seconds")
    parser.add_argument("--json", metavar="OUT", help="write all answers' times here, round by round")
    given = parser.parse_args()
    if given.new_tokens < 2 or len(given.policies.split(",")) < 2:
        parser.error("two policies and two new tokens are the least that can be compared")
    if given.model is None:
        from finemoe.model import reference_model

        given.model = str(reference_model())
    os.environ["FINEMOE_MAPS"] = "none"
    end_as_by_ctrl_c()
    print(render(measure(given)))


if __name__ == "__main__":
    main()
