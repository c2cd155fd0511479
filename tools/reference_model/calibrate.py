"""Initialise a mixture without gradients through the model: neurons, router and scales of each expert.

Per layer, from the dense model's feed-forward inputs on calibration text: balanced soft clusters of tokens by
their neuron energies, a linear router fitted to them, the neurons of highest routed energy for each expert, and
scales by ridge least squares. Letters as in `student`; `N` calibration tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from student import Dense, Student
from torch import Tensor


@dataclass(frozen=True)
class Design:
    """The mixture's sizes, and the mean renormalised top-1 weight that the initial router is scaled to."""

    experts: int
    top_k: int
    neurons: int
    top1: float


def balanced_clusters(patterns: Tensor, experts: int, generator: torch.Generator, rounds: int = 12) -> Tensor:
    """Soft shares `[N, E]` of each token in each cluster; rows sum to 1, clusters are equally used.

    Sinkhorn-balanced k-means: the shares are scaled in turn until both margins are even.
    """
    n = patterns.shape[0]
    centres = patterns[torch.randperm(n, generator=generator)[:experts]]
    shares = torch.empty(n, experts)
    for _ in range(rounds):
        near = patterns @ centres.T - 0.5 * centres.square().sum(dim=-1)
        shares = nnf.softmax((near - near.mean(dim=-1, keepdim=True)) / (0.25 * near.std(dim=-1).mean()), dim=-1)
        for _ in range(30):
            shares = shares / shares.sum(dim=0, keepdim=True) * (n / experts)
            shares = shares / shares.sum(dim=1, keepdim=True)
        centres = (shares.T @ patterns) / shares.sum(dim=0)[:, None]
    return shares


def fit_router(x: Tensor, shares: Tensor, steps: int = 250) -> Tensor:
    """A linear router `[E, D]` that predicts `shares [N, E]` from `x [N, D]`, with even mean use."""
    scale = x.std()
    weight = torch.zeros(shares.shape[1], x.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.02)
    even = torch.full((shares.shape[1],), 1 / shares.shape[1])
    for _ in range(steps):
        log_p = nnf.linear(x / scale, weight).log_softmax(dim=-1)
        balance = (even * (even.log() - log_p.exp().mean(dim=0).log())).sum()
        loss = -(shares * log_p).sum(dim=-1).mean() + 2.0 * balance + 1e-3 * weight.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach() / scale


def temper(x: Tensor, router: Tensor, design: Design) -> Tensor:
    """The router scaled so that the mean renormalised top-1 weight is `design.top1`."""
    logits = nnf.linear(x, router)
    low, high = 1e-3, 1e3
    for _ in range(40):
        middle = (low * high) ** 0.5
        top = (logits * middle).topk(design.top_k, dim=-1).values.softmax(dim=-1)[:, 0].mean()
        low, high = (middle, high) if top < design.top1 else (low, middle)
    return router * low


def routed(x: Tensor, router: Tensor, top_k: int) -> Tensor:
    """Renormalised top-K weights `[N, E]`."""
    top, chosen = nnf.linear(x, router).topk(top_k, dim=-1)
    return torch.zeros(x.shape[0], router.shape[0]).scatter(-1, chosen, top.softmax(dim=-1))


def fit_scales(energy: Tensor, weights: Tensor, mask: Tensor, ridge: float = 0.02) -> Tensor:
    """Scales `[E, F]` that bring every neuron's summed coefficient near 1 where its energy is.

    `energy [N, F]` is each token's squared activation, `weights [N, E]` the routed weights, `mask [E, F]`.
    """
    experts = weights.shape[1]
    outer = (weights[:, :, None] * weights[:, None, :]).flatten(1)
    normal = (energy.T @ outer).view(-1, experts, experts)
    target = energy.T @ weights
    kept = mask.T.float()
    normal = normal * kept[:, :, None] * kept[:, None, :]
    size = normal.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / kept.sum(dim=-1).clamp(min=1) + 1e-12
    pull = ridge * size[:, None]
    normal = normal + torch.diag_embed(pull + (1 - kept) * size[:, None])
    solved = torch.linalg.solve(normal, (target * kept + pull * kept)[..., None])[..., 0]
    return (solved * kept).T.contiguous()


def calibrate(dense: Dense, windows: Tensor, design: Design, seed: int) -> tuple[Student, list[float]]:
    """A student calibrated on `windows [B, T]` of token ids, and every layer's relative output error."""
    generator = torch.Generator().manual_seed(seed)
    layers, neurons = dense.shape.layers, dense.shape.neurons
    taps: list[list[Tensor]] = [[] for _ in range(layers)]
    for batch in windows.split(4):
        dense.hidden(batch, taps)
    routers, scales, masks, errors = [], [], [], []
    for layer in range(layers):
        x = torch.cat(taps[layer])
        taps[layer] = []
        down = dense.layers[layer]["down_proj"]
        activity = dense.neurons(x, layer)
        energy = (activity * down.norm(dim=0)).square()
        shares = balanced_clusters(nnf.normalize(energy.sqrt(), dim=-1), design.experts, generator)
        router = temper(x, fit_router(x, shares), design)
        weights = routed(x, router, design.top_k)
        chosen = (weights.T @ energy).topk(design.neurons, dim=-1).indices
        mask = torch.zeros(design.experts, neurons, dtype=torch.bool).scatter(1, chosen, value=True)
        scale = fit_scales(energy, weights, mask)
        exact = nnf.linear(activity, down)
        wrong = nnf.linear(activity * (weights @ scale - 1), down)
        errors.append(float(wrong.square().sum() / exact.square().sum()))
        routers.append(router)
        scales.append(scale)
        masks.append(mask)
    parts = {
        "router": torch.stack(routers),
        "scales": torch.stack(scales),
        "input_norm": torch.ones_like(dense.input_norm),
        "post_norm": torch.ones_like(dense.post_norm),
        "final_norm": torch.ones_like(dense.final_norm),
    }
    return Student(dense, design.top_k, parts, torch.stack(masks), {}), errors
