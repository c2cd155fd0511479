"""The mixture as a differentiable function of its small trainable parts, at the cost of the dense model.

Every expert is a subset of one dense layer's neurons with scales, so the output of the selected experts is
`down @ (c * silu(gate x) * (up x))` with one coefficient per token and neuron, `c = sum_e w_e s[e]`: exactly the
mixture, without computing shared neurons twice.

Letters: `B` sequences, `T` tokens of one, `L` layers, `E` experts, `K` per token, `D` hidden, `F` dense neurons,
`V` vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from finemoe.model.reference.dense import DenseShape, DenseSource, layer_tensors

PARTS = ("input_norm", "post_norm", "final_norm", "router", "scales")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis."""
    return nnf.rms_norm(x, (x.shape[-1],), weight, eps)


class Dense:
    """The frozen dense model in float32."""

    def __init__(self, source: DenseSource) -> None:
        """Read all weights of `source`."""
        self.shape: DenseShape = source.shape
        self.embedding = torch.from_numpy(source.tensor("model.embed_tokens.weight"))  # [V, D]
        self.final_norm = torch.from_numpy(source.tensor("model.norm.weight"))
        self.layers: list[dict[str, Tensor]] = []
        for layer in range(self.shape.layers):
            names = layer_tensors(self.shape, layer)
            weights = {name.split(".")[-2]: torch.from_numpy(source.tensor(name)) for name in names}
            self.layers.append(weights)
        self.input_norm = torch.stack([weights.pop("input_layernorm") for weights in self.layers])
        self.post_norm = torch.stack([weights.pop("post_attention_layernorm") for weights in self.layers])

    def rotary(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[T, head_dim]`."""
        half = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32) / self.shape.head_dim
        angles = torch.outer(torch.arange(tokens, dtype=torch.float32), self.shape.rope_theta**-half)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def attention(self, x: Tensor, layer: int, rotary: tuple[Tensor, Tensor], delta: dict[str, Tensor]) -> Tensor:
        """Causal self-attention of normed `x [B, T, D]`; `delta` holds low-rank pairs by projection."""
        b, t, _ = x.shape
        weights, shape = self.layers[layer], self.shape

        def project(value: Tensor, part: str) -> Tensor:
            out = nnf.linear(value, weights[f"{part}_proj"])
            if f"{part}.up" in delta:
                out = out + nnf.linear(nnf.linear(value, delta[f"{part}.down"][layer]), delta[f"{part}.up"][layer])
            return out

        def heads(part: str, count: int, *, turn: bool) -> Tensor:
            h = project(x, part).view(b, t, count, shape.head_dim).transpose(1, 2)
            if turn:
                left, right = h.chunk(2, dim=-1)
                h = h * rotary[0] + torch.cat([-right, left], dim=-1) * rotary[1]
            return h.repeat_interleave(shape.heads // count, dim=1)

        q, k = heads("q", shape.heads, turn=True), heads("k", shape.kv_heads, turn=True)
        mixed = nnf.scaled_dot_product_attention(q, k, heads("v", shape.kv_heads, turn=False), is_causal=True)
        return project(mixed.transpose(1, 2).reshape(b, t, -1), "o")

    def neurons(self, x: Tensor, layer: int) -> Tensor:
        """Activations `a = silu(gate x) * (up x)`, `[.., F]`."""
        weights = self.layers[layer]
        return nnf.silu(nnf.linear(x, weights["gate_proj"])) * nnf.linear(x, weights["up_proj"])

    @torch.no_grad()
    def hidden(self, ids: Tensor, taps: list[list[Tensor]] | None = None) -> Tensor:
        """Final normed hidden states `[B, T, D]`; `taps[layer]` collects the feed-forward inputs `[B*T, D]`."""
        rotary = self.rotary(ids.shape[1])
        h = self.embedding[ids]
        for layer in range(self.shape.layers):
            h = h + self.attention(rms_norm(h, self.input_norm[layer], self.shape.rms_eps), layer, rotary, {})
            x = rms_norm(h, self.post_norm[layer], self.shape.rms_eps)
            if taps is not None:
                taps[layer].append(x.flatten(0, 1))
            h = h + nnf.linear(self.neurons(x, layer), self.layers[layer]["down_proj"])
        return rms_norm(h, self.final_norm, self.shape.rms_eps)


@dataclass
class Student:
    """The mixture's small parts over a frozen dense model."""

    dense: Dense
    top_k: int
    parts: dict[str, Tensor]  # PARTS; norms are gains on the dense ones, scales are [L, E, F] and count in the mask
    mask: Tensor  # [L, E, F] bool
    delta: dict[str, Tensor]  # "<q|k|v|o>.<up|down>": [L, out, R] and [L, R, in]

    def route(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Gate distribution and renormalised top-K weights, both `[.., E]` (zero where not selected)."""
        probs = nnf.linear(x, self.parts["router"][layer]).softmax(dim=-1)
        top, chosen = probs.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(probs).scatter(-1, chosen, top / top.sum(dim=-1, keepdim=True))
        return probs, weights

    def hidden(self, ids: Tensor, routes: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Final normed hidden states `[B, T, D]`; `routes` collects every layer's `route`."""
        dense, parts, eps = self.dense, self.parts, self.dense.shape.rms_eps
        rotary = dense.rotary(ids.shape[1])
        h = dense.embedding[ids]
        for layer in range(dense.shape.layers):
            h = h + dense.attention(
                rms_norm(h, dense.input_norm[layer] * parts["input_norm"][layer], eps), layer, rotary, self.delta
            )
            x = rms_norm(h, dense.post_norm[layer] * parts["post_norm"][layer], eps)
            route = self.route(x, layer)
            if routes is not None:
                routes.append(route)
            coefficients = route[1] @ (parts["scales"][layer] * self.mask[layer])
            h = h + nnf.linear(dense.neurons(x, layer) * coefficients, dense.layers[layer]["down_proj"])
        return rms_norm(h, dense.final_norm * parts["final_norm"], eps)


class DistillLoss(torch.autograd.Function):
    """Mean KL(teacher || student) over tokens, in chunks, so that `[T, V]` logits never pile up."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        """`student` and `teacher` are final hidden states `[N, D]`, `head` is `[V, D]`."""
        grad = torch.empty_like(student)
        total = torch.zeros(())
        for rows in torch.arange(student.shape[0]).split(128):
            p_student = nnf.linear(student[rows], head).log_softmax(dim=-1)
            p_teacher = nnf.linear(teacher[rows], head).log_softmax(dim=-1)
            shares = p_teacher.exp()
            total += (shares * (p_teacher - p_student)).sum()
            grad[rows] = (p_student.exp_().sub_(shares)) @ head
        ctx.save_for_backward(grad / student.shape[0])
        return total / student.shape[0]

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def,override]
        """The gradient was computed on the way forward."""
        return ctx.saved_tensors[0] * scale, None, None


@torch.no_grad()
def losses(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each next token, `[B * (T - 1)]`."""
    flat, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    pieces = [
        nnf.cross_entropy(nnf.linear(flat[rows], head), targets[rows], reduction="none")
        for rows in torch.arange(flat.shape[0]).split(256)
    ]
    return torch.cat(pieces)
