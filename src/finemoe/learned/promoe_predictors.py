"""Training of the predictors of `promoe` on recorded requests, and their file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from finemoe.errors import FinemoeError
from finemoe.policy.published.promoe import Floats, Predictors, input_indices, predict_probabilities, update_mean
from finemoe.system import replace_file
from finemoe.types import Recorded

_FORMAT = "finemoe predictors 1"
_ARRAYS = ("inner", "inner_bias", "outer", "outer_bias")
_BATCH = 512
_LEARNING_RATE = 3e-3

Progress = Callable[[int, int, float], None]  # steps done, steps in all, loss


def train(
    requests: Iterable[Recorded],
    layers: int,
    experts: int,
    *,
    seed: int = 0,
    epochs: int = 6,
    hidden: int = 128,
    stride: int = 2,
    history: int = 8,
    progress: Progress | None = None,
) -> Predictors:
    """Trains a predictor for each layer, all at once: Adam on the binary cross-entropy of the executed experts.

    Equal requests, seeds and thread counts give equal predictors.

    Args:
        requests: training data; must not include the requests that the result is measured on.
        layers: `L`.
        experts: the largest `E` of any layer.
        seed: of the initial weights and the order of the data.
        epochs: how often each iteration is used.
        hidden: `H`, the size of the hidden layer.
        stride: how many layers ahead to predict.
        history: of how many layers the gates are inputs.
        progress: called after every step.

    Raises:
        FinemoeError: no request has at least two iterations.
    """
    import torch
    from torch.nn import functional

    stride, history = min(stride, layers), min(history, layers)
    states, executed, rows = _gather(requests, layers, experts)
    if not len(rows):
        raise FinemoeError("no request to train on has two iterations or more; record longer ones")
    generator = torch.Generator().manual_seed(seed)
    features = (history + 2) * experts
    parameters = [
        torch.randn(layers, features, hidden, generator=generator) / features**0.5,
        torch.zeros(layers, 1, hidden),
        torch.randn(layers, hidden, experts, generator=generator) / hidden**0.5,
        torch.full((layers, 1, experts), -2.0),  # most experts are not active
    ]
    for parameter in parameters:
        parameter.requires_grad_()
    inner, inner_bias, outer, outer_bias = parameters
    steps = epochs * -(-len(rows) // _BATCH)
    optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    done = 0
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator).numpy()]
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            batch_inputs = torch.from_numpy(_inputs(states, batch, stride, history))
            targets = torch.from_numpy(_targets(executed, batch, stride))
            logits = torch.baddbmm(outer_bias, torch.baddbmm(inner_bias, batch_inputs, inner).relu(), outer)
            loss = functional.binary_cross_entropy_with_logits(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if progress is not None:
                progress(done, steps, loss.item())
    arrays = [parameter.detach().numpy() for parameter in parameters]
    return Predictors(arrays[0], arrays[1][:, 0].copy(), arrays[2], arrays[3][:, 0].copy(), stride, history)


def recall(predictors: Predictors, requests: Iterable[Recorded]) -> npt.NDArray[np.float64]:
    """`[L]`, by the layer whose predictor it is: recall of the executed experts among as many likeliest ones."""
    states, executed, rows = _gather(requests, predictors.layers, predictors.experts)
    found, total = np.zeros(predictors.layers), np.zeros(predictors.layers)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        batch_inputs = _inputs(states, batch, predictors.stride, predictors.history)
        targets = _targets(executed, batch, predictors.stride)
        for layer in range(predictors.layers):
            p = predict_probabilities(predictors, layer, batch_inputs[layer])
            rank = np.argsort(np.argsort(-p, axis=1, kind="stable"), axis=1)
            found[layer] += targets[layer][rank < targets[layer].sum(axis=1, keepdims=True)].sum()
            total[layer] += targets[layer].sum()
    return found / np.maximum(total, 1)


def save(predictors: Predictors, path: Path, model: str) -> None:
    """Writes the predictors to one file, atomically.

    Args:
        predictors: to save.
        path: of the file; an existing one is replaced.
        model: fingerprint of the model that they were trained for.
    """
    arrays = {name: np.ascontiguousarray(getattr(predictors, name), np.float32) for name in _ARRAYS}
    about = {"stride": predictors.stride, "history": predictors.history, "sha256": _digest(arrays)}
    content = to_bytes(arrays, {"format": _FORMAT, "model": model, "about": json.dumps(about)})
    replace_file(path, content)


def load(path: Path, model: str | None = None) -> Predictors:
    """Reads a file that `save` wrote.

    Args:
        path: of the file.
        model: fingerprint of the model that the predictors must have been trained for; by default any.

    Raises:
        FinemoeError: the file is missing, damaged, not of this format, or for another model.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise FinemoeError(f"{path}: can't read the predictors ({error}); train them again") from error
    if metadata.get("format") != _FORMAT:
        raise FinemoeError(f"{path}: not a file of predictors; train them again")
    try:
        about: dict[str, Any] = json.loads(metadata["about"])
        trained_for, digest, stride, history = metadata["model"], about["sha256"], about["stride"], about["history"]
    except (KeyError, TypeError, ValueError) as error:
        raise FinemoeError(
            f"{path}: the predictors are damaged (their header can't be read); train them again"
        ) from error
    if model is not None and trained_for != model:
        raise FinemoeError(f"{path}: predictors for another model ({trained_for}); train them for this one")
    if set(arrays) != set(_ARRAYS) or digest != _digest(arrays):
        raise FinemoeError(f"{path}: the predictors are damaged; train them again")
    return Predictors(**arrays, stride=stride, history=history)


def _digest(arrays: dict[str, Floats]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _gather(
    requests: Iterable[Recorded], layers: int, experts: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """All iterations as one sequence, with an empty one before each request.

    Returns:
        The states after each iteration `[N, 2, L, E]`, see `input_indices`; the executed experts `[N, L, E]`; and the
        indices of iterations that are followed by another one of the same request.
    """
    empty = np.zeros((1, layers, experts), np.bool_)
    states, executed, rows, total = [np.zeros((0, 2, layers, experts), np.float16)], [empty[:0]], [], 0
    for request in requests:
        roots = np.sqrt(request.gates, dtype=np.float32)
        state = np.zeros((len(roots) + 1, 2, layers, experts), np.float16)
        state[1:, 0] = roots
        mean = np.zeros((layers, experts), np.float32)
        for i, row in enumerate(roots):
            mean = update_mean(mean, row)
            state[i + 1, 1] = mean
        states.append(state)
        executed += [empty, request.executed]
        rows.append(total + np.arange(1, len(roots)))
        total += len(state)
    return np.concatenate(states), np.concatenate(executed), np.concatenate([np.zeros(0, np.int64), *rows])


def _inputs(states: npt.NDArray[np.float16], batch: npt.NDArray[np.int64], stride: int, history: int) -> Floats:
    """`[L, n, F]`: inputs of all predictors, for `n` iterations."""
    pairs = np.stack([states[batch - 1], states[batch]], axis=1, dtype=np.float32).reshape(len(batch), -1)
    places = input_indices(states.shape[2], states.shape[3], stride, history)
    return np.stack([pairs.take(row, axis=1) for row in places])


def _targets(executed: npt.NDArray[np.bool_], batch: npt.NDArray[np.int64], stride: int) -> Floats:
    """`[L, n, E]`: experts executed by the layer a stride ahead, in this iteration or the next."""
    layers = executed.shape[1]
    ahead = [divmod(layer + stride, layers) for layer in range(layers)]
    return np.stack([executed[batch + later, target] for later, target in ahead]).astype(np.float32)
