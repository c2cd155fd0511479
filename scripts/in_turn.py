"""Ways of answering the same prompts that take turns: what they are given, their times, and ratios of these."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from serve_process import number
from transformers import AutoConfig, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from finemoe.trace.prompts import read_prompts

Timed = dict[str, Any]


class _Times(BaseStreamer):
    """When each token came; the prompt is told first."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, _value: torch.Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None: ...


def timed(start_s: float, times_s: list[float]) -> Timed:
    """Of a single token there is no TPOT."""
    row: Timed = {"ttft_s": times_s[0] - start_s, "tokens": len(times_s)}
    return row | ({"tpot_s": (times_s[-1] - times_s[0]) / (len(times_s) - 1)} if len(times_s) > 1 else {})


def by_generate(model: Any, prompt: list[int], new_tokens: int) -> Timed:
    ids, times = torch.tensor([prompt]), _Times()
    start_s = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, top_p=None, top_k=None,
        max_new_tokens=new_tokens, pad_token_id=0, streamer=times,
    )  # fmt: skip
    return timed(start_s, times.times_s[1:])


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    prompts: int,
    tokens: int,
    new_tokens: int,
    repeats: int,
    limit_s: float,
    drawn: bool = False,
) -> None:
    """Flags for what is asked, of which model, how often; these are the defaults. `drawn`: prompts may be left out."""
    otherwise = "; without, random tokens" if drawn else ""
    parser.add_argument("--prompts", required=not drawn, help=f"a file as for finemoe record{otherwise}")
    parser.add_argument("--prompts-limit", type=int, default=prompts)
    parser.add_argument("--model", help="folder (default: the reference model)")
    parser.add_argument("--prompt-tokens", type=int, default=tokens, help="prompts are cut to so many")
    parser.add_argument("--new-tokens", type=int, default=new_tokens)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds")
    parser.add_argument("--limit-s", type=float, default=limit_s, help="begin no round after so many seconds")
    parser.add_argument("--json", metavar="OUT", help="write all answers' times here, as they come")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    given = parser.parse_args()
    if given.model is None:
        from finemoe.model import reference_model

        given.model = str(reference_model())
    return given


def prompts_of(given: argparse.Namespace) -> list[list[int]]:
    """Token ids."""
    if given.prompts is None:
        draws = np.random.default_rng(0)
        vocabulary = AutoConfig.from_pretrained(given.model).get_text_config().vocab_size
        return [draws.integers(0, vocabulary, given.prompt_tokens).tolist() for _ in range(given.prompts_limit)]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = read_prompts(Path(given.prompts), limit=given.prompts_limit).texts
    return [tokenizer(text)["input_ids"][: given.prompt_tokens] for text in texts]


def ratios(rows: list[Timed], way: str, base: str) -> list[float]:
    """TPOT of a way over another's, of the same prompt in the same round."""
    of = {(row["way"], row["round"], row["prompt"]): row["tpot_s"] for row in rows if "tpot_s" in row}
    return [s / of[base, *place] for (name, *place), s in of.items() if name == way and (base, *place) in of]


def interval(values: list[float]) -> tuple[float, float]:
    """95% of the median, by bootstrap."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(low), float(high)


def heading(*bases: str) -> tuple[str, ...]:
    return ("", "answers", "TTFT p50 ms", "TPOT p50 ms", *(f"x {base}" for base in bases))


def cells(rows: list[Timed], way: str, *bases: str) -> tuple[str, ...]:
    """One way's answers below a `heading`; there must be some."""
    own = [row for row in rows if row["way"] == way]
    ttft_s, tpot_s = ([row[name] for row in own if name in row] for name in ("ttft_s", "tpot_s"))
    ttft = number(median(ttft_s), ".1f", 1000)
    tpot = number(median(tpot_s) if tpot_s else None, ".2f", 1000)
    return (
        way,
        str(len(own)),
        ttft,
        tpot,
        *(_against(ratios(rows, way, base) if way != base else []) for base in bases),
    )


def _against(found: list[float]) -> str:
    if not found:
        return "-"
    low, high = interval(found)
    return f"{median(found):.3f} ({low:.3f} to {high:.3f})"
