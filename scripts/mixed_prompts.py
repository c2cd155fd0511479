"""Picks prompts of every domain from a folder of public prompt sets, for recordings and measurements.

python scripts/mixed_prompts.py FOLDER --each 12 --skip 0 > prompts.jsonl

The sets, as they are published: arena_hard_questions, gsm8k_test, mbpp, mt_bench_questions, oasst_messages,
self_instruct_seed_tasks and sharegpt_1000 (.jsonl), HumanEval.jsonl.gz. From each, evenly spread, prompts of 20 to 600
characters; domains take turns. Another `--skip` gives other prompts: what a policy learns from must not be what it is
measured on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from finemoe.trace.prompts import read_prompts

SETS = (
    "arena_hard_questions.jsonl", "gsm8k_test.jsonl", "mbpp.jsonl", "mt_bench_questions.jsonl", "oasst_messages.jsonl",
    "self_instruct_seed_tasks.jsonl", "sharegpt_1000.jsonl", "HumanEval.jsonl.gz",
)  # fmt: skip


def spread(path: Path, each: int, skip: int) -> list[str]:
    """`each` prompts of a set, evenly spread, beginning with the one after `skip`."""
    fit = list(dict.fromkeys(text.strip() for text in read_prompts(path).texts if 20 <= len(text.strip()) <= 600))
    stride = max(1, len(fit) // each)
    if skip >= stride:
        raise SystemExit(f"--skip: {path.name} has only {len(fit)} prompts that fit; give less than {stride}")
    return fit[skip::stride][:each]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=12)
    parser.add_argument("--skip", type=int, default=0)
    arguments = parser.parse_args()
    chosen = [spread(arguments.folder / name, arguments.each, arguments.skip) for name in SETS]
    for turn in zip(*chosen, strict=True):
        for name, prompt in zip(SETS, turn, strict=True):
            print(json.dumps({"prompt": prompt, "domain": name.partition(".")[0]}, ensure_ascii=False))


if __name__ == "__main__":
    main()
