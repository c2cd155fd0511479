"""Measure the built reference model against its dense origin, and write the answers page.

    python tools/reference_model/evaluate.py --model DIR --text DIR --prompts DIR --work DIR \
        --json table.json --answers-page docs/reference-model-answers.md

Perplexity by domain on held-out text, routing statistics on the same text, and greedy answers to fifty prompts with
loops detected. The last line on standard output is one JSON document. --parts leaves parts out.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from answers import dense_transformers, load_or_make
from corpus import DOMAINS, Corpus, chat_prompts
from eval_prompts import PROMPTS
from loops import is_loop
from make_bundle import open_source
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from finemoe.model.reference.bundle import Bundle, load_bundle


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="the built checkpoint, as finemoe.model.reference.ensure() gives it"
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument(
        "--json", type=Path, required=True, help="file for the figures; kept parts of an earlier run stay"
    )
    parser.add_argument("--answers-page", type=Path)
    parser.add_argument("--parts", default="perplexity,answers")
    parser.add_argument("--windows", type=int, default=4, help="held-out windows of 512 tokens per domain")
    parser.add_argument("--chats", type=int, default=24, help="held-out chats, at most")
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--repetition-penalty", type=float, help="1 for none; default: the checkpoint's own")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class RoutingCounts:
    """Statistics of routing over windows of text; one call per window."""

    def __init__(self, experts: int, top_k: int) -> None:
        """For a model of `experts` per layer, `top_k` active."""
        self.experts, self.top_k = experts, top_k
        self.usage: dict[str, Tensor] = {}
        self.reuse: list[float] = []
        self.top: list[Tensor] = []

    def add(self, domain: str, logits: tuple[Tensor, ...]) -> None:
        """Count one window: a router's raw logits `[T, E]` for every layer."""
        stacked = torch.stack([one.float() for one in logits])  # [L, T, E]
        top, chosen = stacked.topk(self.top_k, dim=-1)
        used = torch.zeros_like(stacked).scatter(-1, chosen, 1.0)
        self.usage[domain] = self.usage.get(domain, torch.zeros(stacked.shape[0], self.experts)) + used.sum(dim=1)
        self.reuse.append(float((used[:, 1:] * used[:, :-1]).sum(dim=-1).mean()) / self.top_k)
        self.top.append(top.softmax(dim=-1).mean(dim=(0, 1)))

    def summary(self) -> dict[str, Any]:
        """Usage entropy (bits, of all text and averaged over domains), reuse, weights, distance between domains."""

        def entropy(usage: Tensor) -> float:
            p = usage / usage.sum(dim=-1, keepdim=True)
            return float(-(p * p.clamp_min(1e-12).log2()).sum(dim=-1).mean())

        domains = [usage / usage.sum(dim=-1, keepdim=True) for usage in self.usage.values()]
        apart = [float((a - b).abs().sum(dim=-1).mean() / 2) for i, a in enumerate(domains) for b in domains[:i]]
        return {
            "usage_entropy_bits": entropy(sum(self.usage.values(), torch.zeros(()))),
            "usage_entropy_max_bits": math.log2(self.experts),
            "usage_entropy_within_a_domain_bits": sum(map(entropy, self.usage.values())) / len(self.usage),
            "reuse_by_the_next_token": sum(self.reuse) / len(self.reuse),
            "reuse_at_random": self.top_k / self.experts,
            "mean_weights_by_rank": [round(x, 4) for x in torch.stack(self.top).mean(dim=0).tolist()],
            "usage_distance_between_domains": sum(apart) / len(apart),
        }


def text_windows(args: argparse.Namespace, tokenizer: Any, chats: list[dict[str, str]]) -> dict[str, list[Tensor]]:
    """Held-out token ids by domain, `[1, T]` each; `chat` holds whole chats with the dense model's own answers."""
    corpus = Corpus(args.text, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    rng = random.Random(f"evaluation-{args.seed}")
    windows = {
        domain: [torch.tensor([corpus.window(domain, 512, rng, held_out=True)]) for _ in range(args.windows)]
        for domain in DOMAINS
    }
    windows["chat"] = [
        tokenizer(row["chat"], return_tensors="pt", add_special_tokens=False)["input_ids"] for row in chats
    ]
    return windows


@torch.no_grad()
def perplexities(model: Any, windows: dict[str, list[Tensor]], routing: RoutingCounts | None) -> dict[str, float]:
    """Perplexity by domain."""
    result = {}
    for domain, rows in windows.items():
        total, count = 0.0, 0
        for ids in rows:
            extra = {} if routing is None else {"output_router_logits": True}
            out = model(input_ids=ids, use_cache=False, **extra)
            total += float(functional.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
            if routing is not None:
                routing.add(domain, out.router_logits)
        result[domain] = math.exp(total / count)
        print(f"{domain}: perplexity {result[domain]:.3f} over {count} tokens", flush=True)
    return result


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, args: argparse.Namespace, penalty: float) -> list[dict[str, Any]]:
    """Greedy answers to the fifty prompts."""
    tokenizer.padding_side = "left"
    asked = [(domain, prompt) for domain, prompts in PROMPTS.items() for prompt in prompts]
    asked.sort(key=lambda pair: len(pair[1]))
    rows = []
    for first in range(0, len(asked), args.batch):
        group = asked[first : first + args.batch]
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for _domain, prompt in group
        ]
        given = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**given, max_new_tokens=args.new_tokens, do_sample=False, repetition_penalty=penalty)
        for (domain, prompt), ids in zip(group, out[:, given["input_ids"].shape[1] :].tolist(), strict=True):
            stop = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else None
            kept = ids if stop is None else ids[:stop]
            text = tokenizer.decode(kept, skip_special_tokens=True).strip()
            rows.append({"domain": domain, "prompt": prompt, "answer": text, "tokens": len(kept),
                         "ended": stop is not None, "loop": is_loop(text, kept)})  # fmt: skip
        print(f"answers: {len(rows)}/{len(asked)}", flush=True)
    order = [prompt for prompts in PROMPTS.values() for prompt in prompts]
    return sorted(rows, key=lambda row: order.index(row["prompt"]))


def overlap(bundle: Bundle) -> float:
    """Mean share of an expert's neurons that another expert of its layer has too."""
    shares = []
    for layer in range(bundle.tensors["router"].shape[0]):
        groups = [set(neurons.tolist()) for neurons in bundle.neurons(layer)]
        shares += [len(a & b) / len(a) for i, a in enumerate(groups) for b in groups[:i]]
    return sum(shares) / len(shares)


def answers_page(
    rows: list[dict[str, Any]], dense: list[dict[str, Any]], model: str, new_tokens: int, penalty: float
) -> str:
    """The page of answers, in Markdown."""
    loops, dense_loops = sum(row["loop"] for row in rows), sum(row["loop"] for row in dense)
    lines = [
        "# Fifty answers of the reference model",
        "",
        f"Greedy decoding, at most {new_tokens} new tokens, the model's chat template without a system prompt of ours,",
        f"repetition penalty {penalty}, float32 arithmetic.",
        "The prompts were written before any answer was seen, and none is used in distillation.",
        "Nothing is left out or edited; an answer that ends with […] was cut at the limit.",
        (
            f"Loops found by `tools/reference_model/loops.py`: {loops} of {len(rows)} "
            f"(the dense model: {dense_loops} of {len(dense)})."
        ),
        f"Checkpoint: `{model}`. Made by `tools/reference_model/evaluate.py`.",
    ]
    domain = ""
    for row in rows:
        if row["domain"] != domain:
            domain = row["domain"]
            lines += ["", f"## {domain.capitalize()}"]
        mark = " (loop)" if row["loop"] else ""
        text = row["answer"] + ("" if row["ended"] else " […]")
        lines += ["", f"**{row['prompt']}**{mark}", "", *[f"> {line}".rstrip() for line in text.split("\n")]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts asked for."""
    args = arguments()
    torch.set_num_threads(args.threads)
    parts = args.parts.split(",")
    source = open_source(args.work)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    table: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    windows: dict[str, list[Tensor]] = {}
    if "perplexity" in parts:
        _train, held_out = chat_prompts(args.prompts, args.seed)
        random.Random(args.seed).shuffle(held_out)  # the pools stand one after another
        how = {"new_tokens": 96, "batch": 64, "sample_share": 0.5, "seed": args.seed + 1}
        chats = load_or_make(
            args.work / f"held-out-{args.chats}.json", source, tokenizer, held_out[: args.chats], **how
        )
        windows = text_windows(args, tokenizer, chats)
    began = time.monotonic()
    mixture = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    penalty = args.repetition_penalty or mixture.generation_config.repetition_penalty or 1.0
    table["model"] = args.model.name
    table["parameters"] = sum(p.numel() for p in mixture.parameters())
    table["expert_overlap"] = overlap(load_bundle())
    if "answers" in parts:
        table["repetition_penalty"] = penalty
        table["answers"] = greedy(mixture, tokenizer, args, penalty)
        table["loops"] = sum(row["loop"] for row in table["answers"])
    if "perplexity" in parts:
        routing = RoutingCounts(mixture.config.num_local_experts, mixture.config.num_experts_per_tok)
        table["perplexity"] = perplexities(mixture, windows, routing)
        table["held_out_tokens"] = {domain: sum(w.shape[1] - 1 for w in rows) for domain, rows in windows.items()}
        table["routing"] = routing.summary()
    del mixture
    keep(args, table)
    dense = dense_transformers(source)
    if "perplexity" in parts:
        table["perplexity_dense"] = perplexities(dense, windows, None)
    if "answers" in parts:
        table["answers_dense"] = greedy(dense, tokenizer, args, penalty)
        table["loops_dense"] = sum(row["loop"] for row in table["answers_dense"])
    table["seconds"] = round(time.monotonic() - began, 1)
    keep(args, table)
    print(json.dumps({key: value for key, value in table.items() if not key.startswith("answers")}))


def keep(args: argparse.Namespace, table: dict[str, Any]) -> None:
    """Write the figures, and the page of answers when it is asked for."""
    args.json.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.answers_page and "answers" in table:
        page = answers_page(
            table["answers"],
            table.get("answers_dense", []),
            table["model"],
            args.new_tokens,
            table["repetition_penalty"],
        )
        args.answers_page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
