"""How fast a token is on cores that other processes want too, by how long OpenMP's idle threads spin.

python scripts/shared_cores.py --neighbours 0,1 --spins 300000,20000,5000,1000 --repeats 3 --model MODEL

Each row is a process of its own (`finemoe generate`, nothing learned before), rows in turn; a neighbour is a process
that computes without end. 300,000 is GNU OpenMP's own default, 5,000 what finemoe's commands set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from statistics import median

PROMPT = "Explain how rain forms, in detail."


def tpot_ms(arguments: argparse.Namespace, spins: int, neighbours: int) -> float:
    """Of one answer, beside so many neighbours."""
    command = [
        sys.executable, "-m", "finemoe", "generate", PROMPT, "--json", "--expert-memory", arguments.expert_memory,
        "--policy", arguments.policy, "--max-new-tokens", str(arguments.new_tokens), "--map-store", "none",
        *(["--model", arguments.model] if arguments.model else []),
    ]  # fmt: skip
    with ExitStack() as stack:
        for _ in range(neighbours):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        environment = os.environ | {"GOMP_SPINCOUNT": str(spins)}
        answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return 1e3 * float(json.loads(answer.stdout)["tpot_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--expert-memory", default="25%")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--spins", default="300000,20000,5000,1000")
    parser.add_argument("--neighbours", default="0,1")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    spins = [int(word) for word in arguments.spins.split(",")]
    neighbours = [int(word) for word in arguments.neighbours.split(",")]
    rows: dict[tuple[int, int], list[float]] = {(count, beside): [] for count in spins for beside in neighbours}
    for _ in range(arguments.repeats):
        for (count, beside), times in rows.items():
            times.append(tpot_ms(arguments, count, beside))
            print(f"spins {count}, {beside} neighbours: {times[-1]:.0f} ms", file=sys.stderr, flush=True)
    print("| spins | " + " | ".join(f"{beside} neighbours, ms a token" for beside in neighbours) + " |")
    print("|---:|" + "---:|" * len(neighbours))
    for count in spins:
        cells = (rows[count, beside] for beside in neighbours)
        print(
            f"| {count} | "
            + " | ".join(f"{median(cell):.0f} ({', '.join(f'{x:.0f}' for x in cell)})" for cell in cells)
            + " |"
        )


if __name__ == "__main__":
    main()
