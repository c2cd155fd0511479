"""Puts the JSON of several `finemoe simulate` runs over one trace together: tables for a document, and the plots.

finemoe simulate TRACE .. --json 25.json; finemoe simulate TRACE .. --json 50.json
python scripts/simulation_results.py 25.json 50.json --plot OUT.png > OUT.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from finemoe.sim.report import draw, markdown
from finemoe.sim.sweep import Row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in arguments.results]
    varied = {"expert_memory", "link_ratio", "policy", "workers"}
    alike = [{k: v for k, v in d["settings"].items() if k not in varied} for d in documents]
    if any(each != alike[0] for each in alike):
        raise SystemExit("the runs differ in more than policies, budgets and link ratios")
    rows = [Row(**row) for document in documents for row in document["rows"]]
    order = list(dict.fromkeys(row.policy for row in rows))
    shares, ratios = sorted({row.expert_memory for row in rows}), sorted({row.link_ratio for row in rows})
    print("### Time per layer (1 = no stall), with the hit rate\n")
    for share in shares:
        print(f"\n**{share:.0%} of the experts in memory**\n")
        print("| policy | " + " | ".join(f"r = {ratio:g}" for ratio in ratios) + " |")
        print("|---|" + "---:|" * len(ratios))
        for policy in order:
            found = {row.link_ratio: row for row in rows if (row.policy, row.expert_memory) == (policy, share)}
            cells = [f"{found[r].time_per_layer:.3f} ({found[r].hit_rate:.1%})" if r in found else "" for r in ratios]
            starred = any(row.emulated for row in found.values())
            print(f"| {policy}{'*' if starred else ''} | " + " | ".join(cells) + " |")
    for text in sorted({row.emulated for row in rows if row.emulated}):
        print(f"\n\\* emulated, not recorded: {text}")
    print("\n### All columns\n")
    print(markdown(sorted(rows, key=lambda row: (row.expert_memory, row.link_ratio, order.index(row.policy)))))
    if arguments.plot:
        first = documents[0]
        draw(rows, f"{first['model']}: {first['layers']} layers of {first['experts']} experts", arguments.plot)


if __name__ == "__main__":
    main()
