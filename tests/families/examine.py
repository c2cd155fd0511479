"""Loads a tiny model of a family with offloaded experts, and compares it with transformers' eager path, bit by bit."""

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
    """A family's support; `why` is the reason of a refusal, the first difference, or transformers' own error."""

    status: Literal["exact", "refused", "different", "unusable"]
    why: str = ""


def examine(family: str, dtype: torch.dtype, folder: Path) -> Verdict:
    """Saves a tiny model to `folder`, and compares it with the smallest budget, half of the experts, and all."""
    try:
        built = build(family, dtype)
    except (RuntimeError, ValueError) as error:
        return unusable(error)
    built.save_pretrained(folder, max_shard_size=SHARD)
    return compare(type(built), folder, dtype)


def compare(model_class: type[PreTrainedModel], folder: Path, dtype: torch.dtype) -> Verdict:
    """Compares the checkpoint in `folder`, offloaded and not."""
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
            if not stats.accesses or stats.resident > stats.slots:  # all slots may have prefetches in flight
                return Verdict("different", f"{stats.accesses} accesses, {stats.resident} resident of {stats.slots}")
    return Verdict("exact")


def unusable(error: Exception) -> Verdict:
    """The verdict if this transformers fails without finemoe."""
    first_line, _, _ = str(error).partition("\n")
    return Verdict("unusable", f"transformers {transformers.__version__}: {first_line}")


def least_memory(folder: Path, dtype: torch.dtype) -> str:
    """The smallest budget that loads, from the error message for a smaller one."""
    try:
        finemoe.load(folder, expert_memory="1B", dtype=dtype).close()
    except BudgetError as refusal:
        named = re.search(r"(\d+) bytes", str(refusal))
        if named is None:
            raise
        return f"{named[1]}B"
    raise AssertionError("a budget of one byte was accepted")
