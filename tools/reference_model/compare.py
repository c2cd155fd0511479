"""Compare the variants that make_bundle.py kept in --work by held-out perplexity, before a checkpoint is built.

    python tools/reference_model/compare.py --text DIR --work DIR

One line for the dense model, for every calibration, and for every distillation (its last saved step). The
arithmetic is the student's, in float32, without the rounding of the bundle and the checkpoint.
"""

import argparse
import random
from pathlib import Path

import torch
from corpus import DOMAINS, Corpus
from make_bundle import open_source
from student import Dense, Student, losses
from torch import Tensor
from transformers import AutoTokenizer


def row(name: str, dense: Dense, windows: dict[str, Tensor], student: Student | None) -> str:
    """A Markdown table row: perplexity by domain, and over all tokens."""
    with torch.no_grad():
        found = [
            losses(dense.hidden(ids) if student is None else student.hidden(ids), dense.embedding, ids)
            for ids in windows.values()
        ]
    cells = [float(one.mean().exp()) for one in [*found, torch.cat(found)]]
    return f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=2, help="held-out windows of 512 tokens per domain")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense = Dense(open_source(args.work))
    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer")
    corpus = Corpus(args.text, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    rng = random.Random(f"comparison-{args.seed}")
    windows = {
        domain: torch.tensor([corpus.window(domain, 512, rng, held_out=True) for _ in range(args.windows)])
        for domain in DOMAINS
    }
    print(f"| variant | {' | '.join(DOMAINS)} | all |\n|---|{'---|' * (len(DOMAINS) + 1)}")
    print(row("dense", dense, windows, None), flush=True)
    for start in sorted(args.work.glob("calibration-*.pt")):
        experts, top_k, neurons, seed = start.stem.split("-")[1:]
        name = f"{experts} experts, top-{top_k}, {neurons} neurons"
        kept = torch.load(start, weights_only=True)
        student = Student(dense, int(top_k), kept["parts"], kept["mask"], {})
        print(row(f"{name}, calibrated", dense, windows, student), flush=True)
        for state in sorted(args.work.glob(f"distillation-{experts}-{top_k}-{neurons}-*-{seed}-*.pt")):
            trained = torch.load(state, weights_only=True)
            tensors = trained["tensors"]
            student.parts = {part: tensors.pop(part) for part in student.parts}
            student.delta = tensors
            print(row(f"{name}, distilled {trained['step']} steps", dense, windows, student), flush=True)


if __name__ == "__main__":
    main()
