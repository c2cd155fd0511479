"""`finemoe inspect`: a model's layers, experts and bytes, from headers alone."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

from finemoe.budget import format_bytes
from finemoe.config import EXPERT_DTYPES

if TYPE_CHECKING:
    from finemoe.model import Description


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    add_model_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose the model."""
    parser.add_argument("--model", default=None, help="folder or hub id; by default the built-in reference model")
    parser.add_argument("--revision", default=None, help="hub revision (branch, tag or commit)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run modelling code that the model repo ships")
    parser.add_argument(
        "--expert-dtype",
        choices=EXPERT_DTYPES,
        default="stored",
        help="describe the lossy copy that loading with this flag makes",
    )


def describe_model(arguments: argparse.Namespace) -> Description:
    """Describes the model that the flags choose."""
    from finemoe.model import chosen_model
    from finemoe.model.describe import describe

    return describe(
        chosen_model(arguments.model),
        arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        expert_dtype=arguments.expert_dtype,
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    description = describe_model(arguments)
    print(json.dumps(as_dict(description)) if arguments.json else table(description))
    return 0


def as_dict(description: Description) -> dict[str, Any]:
    """The description as a JSON object."""
    expert_index = description.expert_index
    return {
        "model": description.name,
        "class": description.kind,
        "layers": description.layers,
        "experts": expert_index.experts,
        "experts_per_token": description.active,
        "expert_bytes": expert_index.weight_bytes,
        "expert_dtype": expert_index.stored_dtype,
        "lossy": description.lossy,
        "dense_bytes": description.dense_bytes,
        "slot_bytes": expert_index.slot_bytes,
        "least_expert_memory_bytes": description.least_slots * expert_index.slot_bytes,
        "moe_layers": [
            {
                "module": layout.module,
                "experts": layout.experts,
                "bytes_per_expert": layout.weight_bytes,
                "parameters": [
                    {"name": field.name, "shape": list(field.shape), "dtype": layout.stored_as(field)}
                    for field in layout.fields
                ],
            }
            for layout in expert_index.layouts
        ],
    }


def stored_as(description: Description) -> str:
    """The dtype of the experts, and whether it is the checkpoint's."""
    return description.expert_index.stored_dtype + (" (lossy copy: --expert-dtype)" if description.lossy else "")


def table(description: Description) -> str:
    """The description as text; equal layers share a line."""
    index = description.expert_index
    least = description.least_slots
    lines = [
        f"{description.name}: {description.kind}",
        f"{description.layers} MoE layers, {index.experts} routed experts, {description.active} active per token",
        f"routed experts {format_bytes(index.weight_bytes)}, everything else {format_bytes(description.dense_bytes)}",
        f"one expert takes {format_bytes(index.slot_bytes)}, stored as {stored_as(description)}",
        f"the least --expert-memory is {format_bytes(least * index.slot_bytes)} ({least} experts)",
        "",
    ]
    for _, alike in groupby(index.layouts, key=lambda each: (each.experts, each.weight_bytes, each.stored_dtype)):
        group = list(alike)
        names = group[0].module if len(group) == 1 else f"{group[0].module} .. {group[-1].module}"
        parts = ", ".join(
            f"{field.name} {'x'.join(map(str, field.shape))} {group[0].stored_as(field)}" for field in group[0].fields
        )
        lines.append(f"{names}: {group[0].experts} experts of {format_bytes(group[0].weight_bytes)} ({parts})")
    return "\n".join(lines)
