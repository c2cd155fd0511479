"""Load a tiny model of a family with its experts offloaded; compare it with transformers' eager path, bit by bit."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import PreTrainedModel

import finemoe
from finemoe import BudgetError, UnsupportedModelError
from tests.families.evaluate import answers
from tests.families.factory import build
from tests.tiny import aligned

SHARD = "200KB"  # several files per checkpoint


@dataclass(frozen=True)
class Verdict:
    """How a family fares: `why` says what is refused, where answers first differ, or how transformers itself fails."""

    status: Literal["exact", "refused", "different", "unusable"]
    why: str = ""


def examine(family: str, dtype: torch.dtype, folder: Path) -> Verdict:
    """Save a tiny model to `folder`; compare at the least expert memory, at half and with all experts resident."""
    try:
        built = build(family, dtype)
    except (RuntimeError, ValueError) as error:
        return unusable(error)
    built.save_pretrained(folder, max_shard_size=SHARD)
    return compare(type(built), folder, dtype)


def compare(model_class: type[PreTrainedModel], folder: Path, dtype: torch.dtype) -> Verdict:
    """Compare on the checkpoint in `folder`, whoever wrote it."""
    try:
        budgets = (least_memory(folder, dtype), "50%", "all")
    except UnsupportedModelError as refusal:
        return Verdict("refused", str(refusal))
    reference = aligned(model_class.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval())
    try:
        expected = answers(reference)
    except (RuntimeError, ValueError) as error:
        return unusable(error)
    for budget in budgets:
        with finemoe.load(folder, expert_memory=budget, dtype=dtype) as model:
            for name, got in answers(model).items():
                if not torch.equal(got, expected[name]):
                    gap = (got.float() - expected[name].float()).abs().max().item()
                    return Verdict("different", f"{name} at {budget}, {dtype}: by up to {gap:.3g}")
            model.finemoe.check_integrity()
            stats = model.finemoe.stats()
            if not stats.accesses or stats.resident > stats.slots:  # a prefetch may be on its way into every slot
                return Verdict("different", f"{stats.accesses} accesses, {stats.resident} resident of {stats.slots}")
    return Verdict("exact")


def unusable(error: Exception) -> Verdict:
    """Without finemoe, this transformers fails."""
    first_line, _, _ = str(error).partition("\n")
    return Verdict("unusable", f"transformers {transformers.__version__}: {first_line}")


def least_memory(folder: Path, dtype: torch.dtype) -> str:
    """The smallest budget that loads, as the refusal of a smaller one names it."""
    try:
        finemoe.load(folder, expert_memory="1B", dtype=dtype).close()
    except BudgetError as refusal:
        named = re.search(r"(\d+) bytes", str(refusal))
        if named is None:
            raise
        return f"{named[1]}B"
    raise AssertionError("one byte was enough")
