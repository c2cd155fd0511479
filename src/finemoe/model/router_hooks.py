"""Finds a model's routers, and records what each forward pass executed and what the gates gave, layer by layer.

Executed indices and weights are taken where the experts module is called, so they are exact. The gates' output comes
from the modules that transformers itself records as `router_logits`. The hooks change nothing.

Shapes: `B` requests, `S` positions, `T = B * S` rows, `L` MoE layers, `E` experts of a layer, `K` experts per token,
`D` hidden size, `n` layers of lookahead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finemoe.engine.expert_layer import HANDLE, ExpertLayer
from finemoe.errors import ConfigError, UnsupportedModelError

Scale = Literal["softmax", "sigmoid", "scores"]  # how a gate's scores become a distribution
_TOLERANCE = 0.05  # of the 90th percentile of log-ratio errors; bfloat16 weights are off by some thousandths


class Router(NamedTuple):
    """A gate module, and how to get its scores."""

    module: nn.Module
    output_index: int  # of the scores, in a tuple that the module returns
    standalone: bool  # it can be run on its own; false for a block that would run its experts too
    linear: bool = False  # its scores are exactly `F.linear` of the hidden states with its own weight


@dataclass
class RecordedPass:
    """One forward pass over a batch `[B, S]`, in host memory. `None`: was not recorded.

    `scores` and `ahead` are the gates' raw scores in float32, or float16 distributions if the tap knows their scale.
    """

    token_ids: Tensor  # int64 [B, S]
    embedding: Tensor  # [B, S, D]
    ids: Tensor  # int64 [T, L, K], by weight, descending; E and above: no expert
    weights: Tensor  # float32 [T, L, K]
    scores: Tensor | None  # [T, L, E]
    ahead: Tensor | None  # [T, n, L, E]: at [:, j, l], gate l + 1 + j on gate l's input; 0 beyond the last layer


class RouterTap:
    """Records the routing of an offloaded model's forward passes.

    Args:
        model: from `finemoe.load`.
        lookahead: `n`, for how many layers ahead to run the gates.

    Raises:
        UnsupportedModelError: layers share their experts, so that a layer has no routing of its own.
        ConfigError: `lookahead` is above 0, but the gates can't be run on their own; or it is too large.
    """

    def __init__(self, model: Any, lookahead: int = 0) -> None:
        self._model = model
        self._experts = _experts_modules(model)
        self.layers = len(self._experts)
        self.experts_of = [module.__dict__[HANDLE].layout.experts for _, module in self._experts]
        self.experts = max(self.experts_of)
        self.experts_paths = [path for path, _ in self._experts]
        self.routers = find_routers(model, self.experts_paths)
        self.lookahead = lookahead
        if lookahead and not all(router is not None and router.standalone for router in self.routers):
            raise ConfigError("--lookahead: this model's gates can't be run on their own; leave it out")
        if lookahead >= max(self.layers, 2):
            raise ConfigError(f"--lookahead: {lookahead} is not below the model's {self.layers} MoE layers")
        self.scale: Scale | None = None  # set it to record distributions instead of raw scores
        self._current: _PassBuilder | None = None
        self._passes: list[RecordedPass] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the passes within the block, and drops those of earlier blocks.

        Raises:
            UnsupportedModelError: a pass did not route every token through every MoE layer once.
        """
        self._passes = []
        hooks = [self._model.get_input_embeddings().register_forward_hook(self._on_embedding)]
        for layer, (_, module) in enumerate(self._experts):
            hooks.append(module.register_forward_pre_hook(self._on_experts(layer, module), with_kwargs=True))
        for layer, router in enumerate(self.routers):
            if router is not None:
                hooks.append(router.module.register_forward_hook(self._on_router(layer, router), with_kwargs=True))
        try:
            yield
            self._end_pass()
        finally:
            for hook in hooks:
                hook.remove()
            self._current = None

    def take(self) -> list[RecordedPass]:
        """Hands over the passes of the last block."""
        taken, self._passes = self._passes, []
        return taken

    def _end_pass(self) -> None:
        current, self._current = self._current, None
        if current is not None and current.started:  # some models embed more than once before their first layer
            self._passes.append(current.build())

    def _on_embedding(self, _module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self._end_pass()
        self._current = _PassBuilder(self, arguments[0], output.detach())

    def _on_experts(self, layer: int, module: nn.Module) -> Callable[..., None]:
        signature = inspect.signature(module.forward)

        def collect(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if self._current is not None:
                _, ids, weights = list(signature.bind(*arguments, **keywords).arguments.values())[:3]
                self._current.add_executed(layer, ids.detach(), weights.detach())

        return collect

    def _on_router(self, layer: int, router: Router) -> Callable[..., None]:
        def collect(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if self._current is not None:
                self._current.add_scores(layer, scores_of(router, output).float())
                for distance in range(1, min(self.lookahead, self.layers - 1 - layer) + 1):
                    later = self.routers[layer + distance]
                    assert later is not None
                    self._current.add_lookahead(layer, distance, run_router(later, arguments, keywords).float())

        return collect


class _PassBuilder:
    """Collects a pass while it runs."""

    def __init__(self, tap: RouterTap, token_ids: Tensor, embedding: Tensor) -> None:
        self._tap = tap
        self._token_ids = token_ids
        self._embedding = embedding
        self._ids: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}
        self._scores: dict[int, Tensor] = {}
        self._ahead: dict[tuple[int, int], Tensor] = {}

    @property
    def started(self) -> bool:
        return bool(self._ids)

    def add_executed(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        rows = self._token_ids.numel()
        if layer in self._ids or ids.shape[0] != rows:
            path = self._tap.experts_paths[layer]
            raise UnsupportedModelError(f"{path} did not route all {rows} tokens at once; it can't be recorded")
        experts = self._tap.experts_of[layer]
        ids, weights = ids.long(), weights.float()
        order = weights.masked_fill(ids >= experts, -torch.inf).argsort(dim=1, descending=True, stable=True)
        self._ids[layer] = ids.masked_fill(ids >= experts, self._tap.experts).gather(1, order)
        self._weights[layer] = weights.masked_fill(ids >= experts, 0).gather(1, order)

    def add_scores(self, layer: int, scores: Tensor) -> None:
        self._scores[layer] = self._scaled(scores)

    def add_lookahead(self, layer: int, distance: int, scores: Tensor) -> None:
        self._ahead[distance - 1, layer] = self._scaled(scores)

    def _scaled(self, scores: Tensor) -> Tensor:
        return scores if self._tap.scale is None else normalise(scores, self._tap.scale).half()

    def build(self) -> RecordedPass:
        tap, layers = self._tap, range(self._tap.layers)
        if len(self._ids) != len(layers):
            missing = next(layer for layer in layers if layer not in self._ids)
            path = tap.experts_paths[missing]
            raise UnsupportedModelError(f"{path} did not run on text; this model's routing can't be recorded")
        active = max(ids.shape[1] for ids in self._ids.values())
        rows = self._token_ids.numel()
        ids = torch.full((rows, len(layers), active), tap.experts)
        weights = torch.zeros(rows, len(layers), active)
        for layer in layers:
            ids[:, layer, : self._ids[layer].shape[1]] = self._ids[layer]
            weights[:, layer, : self._weights[layer].shape[1]] = self._weights[layer]
        scores = None
        if all(layer in self._scores and self._scores[layer].shape == (rows, tap.experts) for layer in layers):
            scores = torch.stack([self._scores[layer] for layer in layers], 1)
        ahead = None
        if tap.lookahead and scores is not None:
            ahead = torch.zeros(rows, tap.lookahead, len(layers), tap.experts, dtype=scores.dtype)
            for (distance, layer), predicted in self._ahead.items():
                ahead[:, distance, layer] = predicted
        tables = self._token_ids, self._embedding, ids, weights, scores, ahead
        return RecordedPass(*(None if each is None else each.cpu() for each in tables))  # type: ignore[arg-type]


def find_routers(model: nn.Module, experts: list[str]) -> list[Router | None]:
    """The gate of each experts module: the module whose output transformers records as `router_logits`.

    Of several candidates, an experts module's own is the one with the longest common path prefix.

    Args:
        experts: paths of the experts modules.

    Returns:
        A router or `None` for each experts module; all `None` if two of them would share one.
    """
    candidates = dict(_router_candidates(model))
    found: list[Router | None] = []
    for name in experts:
        common = {path: _common_parts(path, name) for path in candidates}
        best = [path for path, length in common.items() if length == max(common.values())]
        path = best[0] if len(best) == 1 else None
        if path is None:
            found.append(None)
            continue
        module, index = candidates[path]
        standalone = not any(HANDLE in inner.__dict__ for inner in module.modules())
        found.append(Router(module, index, standalone))
    taken = [id(router.module) for router in found if router is not None]
    return found if len(set(taken)) == len(taken) else [None] * len(found)


def infer_scale(scores: Tensor, ids: Tensor, weights: Tensor) -> tuple[Scale, bool]:
    """How a model turns gate scores into weights, inferred from the ratios of the weights, whatever their sum.

    Args:
        scores: `[T, L, E]`.
        ids: `[T, L, K]`; E and above are no expert.
        weights: `[T, L, K]`.

    Returns:
        The scale, and whether it explains the weights; softmax is assumed if none does.
    """
    ran = (ids < scores.shape[-1]) & (weights > 0)
    pairs = ran & ran[..., :1]
    pairs[..., 0] = False
    if not pairs.any():
        return "softmax", False
    own = scores.gather(-1, ids.clamp_max(scores.shape[-1] - 1))
    logs = weights.clamp_min(1e-30).log()
    ratios = (logs - logs[..., :1])[pairs]
    errors: dict[Scale, float] = {}
    for scale in ("scores", "softmax", "sigmoid"):
        if scale == "scores" and bool((scores < 0).any()):
            continue
        value = {"scores": own.clamp_min(1e-30).log(), "softmax": own, "sigmoid": nn.functional.logsigmoid(own)}[scale]
        errors[scale] = float(((value - value[..., :1])[pairs] - ratios).abs().quantile(0.9))
    best = min(errors, key=lambda scale: errors[scale])
    return (best, True) if errors[best] <= _TOLERANCE else ("softmax", False)


def normalise(scores: Tensor, scale: Scale) -> Tensor:
    """Gate scores `[.., E]` as float32 distributions. Recording and serving both use this function."""
    if scale == "softmax":
        return scores.softmax(-1, dtype=torch.float32)
    positive = scores.float().sigmoid() if scale == "sigmoid" else scores.float()
    return positive / positive.sum(-1, keepdim=True).clamp_min(1e-30)


def _experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of each MoE layer, in the order of the layers."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        expert_layer: ExpertLayer | None = module.__dict__.get(HANDLE)
        if expert_layer is not None:
            layer = expert_layer.layer
            if layer in found:
                raise UnsupportedModelError(f"{name} shares experts with {found[layer][0]}; not recorded yet")
            found[layer] = name, module
    return [found[layer] for layer in sorted(found)]


def _router_candidates(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    """Path, module and output index of everything that a model or its parts record as router logits."""
    for owner_path, owner in model.named_modules():
        if not isinstance(owner, PreTrainedModel):
            continue
        specs = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", ())
        for spec in specs if isinstance(specs, list | tuple) else (specs,):
            kind: Any = getattr(spec, "target_class", spec)
            index = int(getattr(spec, "index", 1))  # transformers' own default for what is not a hidden state
            part = getattr(spec, "layer_name", None)
            for path, module in owner.named_modules(prefix=owner_path):
                within = part is None or f".{part.strip('.')}." in f".{path}."
                matches = isinstance(kind, type) and isinstance(module, kind)
                if matches and within:
                    yield path, (module, index)


def _common_parts(one: str, other: str) -> int:
    """Length of the common prefix of two module paths, in parts."""
    parts = list(zip(one.split("."), other.split("."), strict=False))
    return next((count for count, (a, b) in enumerate(parts) if a != b), len(parts))


def detect_linear(router: Router, dtype: torch.dtype) -> Router:
    """The same gate, with `linear` set if a trial shows its scores to be `F.linear` of its input, bit for bit.

    Args:
        router: standalone, with its weights loaded.
        dtype: of the hidden states.
    """
    weight = getattr(router.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return router
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, weight.shape[1], generator=generator).to(weight.device, dtype)
    with torch.no_grad():
        try:
            own, linear = scores_of(router, router.module.forward(hidden)), _flat(_linear(router.module, hidden))
        except (RuntimeError, TypeError, ValueError, AttributeError):  # it takes something else than hidden states
            return router
    return router._replace(linear=torch.equal(own, linear))  # noqa: SLF001 - public, by a named tuple's convention


def run_router(router: Router, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Scores `[T, E]` of a standalone gate on another gate's input, without its hooks."""
    with torch.no_grad():
        if router.linear and len(arguments) == 1 and not keywords:
            return _flat(_linear(router.module, arguments[0]))
        return scores_of(router, router.module.forward(*arguments, **keywords))


def _linear(module: Any, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, module.weight, getattr(module, "bias", None))


def scores_of(router: Router, output: Any) -> Tensor:
    """Scores `[T, E]` from a gate's output, in its own dtype."""
    return _flat(output[router.output_index] if isinstance(output, tuple) else output)


def _flat(scores: Tensor) -> Tensor:
    scores = scores.detach() if scores.requires_grad else scores  # saves an operation per layer
    return scores if scores.dim() == 2 else scores.reshape(-1, scores.shape[-1])
