"""Distil the dense model into the mixture's small parts: KL on the dense model's logits, Adam, resumable."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from student import DistillLoss, Student
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Length and learning rates (Adam's, for parameters of order 1; the router's is relative to its own size)."""

    steps: int
    tokens: int  # per step
    norm_rate: float
    router_rate: float
    scale_rate: float
    delta_rate: float
    balance: float  # weight of the load-balance term
    warmup: int = 10


def groups(student: Student, schedule: Schedule) -> list[dict[str, Any]]:
    """Adam's parameter groups; every tensor becomes trainable."""
    parts = student.parts
    for tensor in (*parts.values(), *student.delta.values()):
        tensor.requires_grad_(requires_grad=True)
    router_size = float(parts["router"].detach().square().mean().sqrt())
    sized = [
        ([parts["input_norm"], parts["post_norm"], parts["final_norm"]], schedule.norm_rate),
        ([parts["router"]], schedule.router_rate * router_size),
        ([parts["scales"]], schedule.scale_rate),
        (list(student.delta.values()), schedule.delta_rate),
    ]
    return [{"params": tensors, "lr": rate, "full_rate": rate} for tensors, rate in sized if tensors]


def balance_term(routes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Load-balance loss, 1 when all experts of every layer are used alike (as in Switch Transformers)."""
    total = torch.zeros(())
    for probs, weights in routes:
        experts = probs.shape[-1]
        used = (weights > 0).float().flatten(0, -2).mean(dim=0)
        total = total + experts * (used / used.sum() * probs.flatten(0, -2).mean(dim=0)).sum()
    return total / len(routes)


def distill(
    student: Student,
    batch: Callable[[random.Random], Tensor],
    schedule: Schedule,
    *,
    seed: int,
    state: Path,
    stop_at: float = math.inf,
    every: int = 20,
    on_save: Callable[[int], None] = lambda _step: None,
) -> int:
    """Train `student` in place; the number of steps done.

    `batch(rng)` gives token ids `[B, T]`; step n sees `random.Random(f"{seed}-{n}")`, so a resumed run equals an
    unbroken one. Progress is kept at `state` every `every` steps, and `on_save(step)` is called then. Training
    stops early at the wall-clock second `stop_at`.
    """
    optimizer = torch.optim.Adam(groups(student, schedule), betas=(0.9, 0.98))
    done = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        done = kept["step"]
        with torch.no_grad():
            for name, tensor in (student.parts | student.delta).items():
                tensor.copy_(kept["tensors"][name])
        optimizer.load_state_dict(kept["optimizer"])
    dense, began = student.dense, time.monotonic()
    while done < schedule.steps and time.time() < stop_at:
        rate = min(1.0, (done + 1) / schedule.warmup) * 0.5 * (1 + math.cos(math.pi * done / schedule.steps))
        for group in optimizer.param_groups:
            group["lr"] = group["full_rate"] * max(rate, 0.02)
        ids = batch(random.Random(f"{seed}-{done}"))
        teacher = dense.hidden(ids).flatten(0, 1)
        routes: list[tuple[Tensor, Tensor]] = []
        hidden = student.hidden(ids, routes).flatten(0, 1)
        kl = DistillLoss.apply(hidden, teacher, dense.embedding)
        even = balance_term(routes)
        optimizer.zero_grad()
        (kl + schedule.balance * even).backward()
        optimizer.step()
        done += 1
        print(f"step {done}/{schedule.steps} kl {float(kl):.4f} balance {float(even):.3f} "
              f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
        if done % every == 0 or done == schedule.steps:
            _save(state, student, optimizer, done)
            on_save(done)
    return done


def _save(state: Path, student: Student, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {name: tensor.detach() for name, tensor in (student.parts | student.delta).items()}
    part = state.with_suffix(".part")
    torch.save({"step": step, "tensors": tensors, "optimizer": optimizer.state_dict()}, part)
    part.replace(state)
