"""Builds tiny models with random weights, one per family.

The weights make errors visible: experts are large enough to affect the logits, and router weights are spread so that
many experts are used. A configuration is first built on the meta device, and must be small.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.families.catalogue import catalogue
from tests.families.overrides import OVERRIDES
from tests.families.shrink import EXPERTS, tiny_config

MAX_PARAMETERS = 5_000_000

FAMILIES: list[str] = list(catalogue())

UNBUILDABLE = {
    "qwen3_omni_moe": "three models behind one `generate`, no forward pass; its text model is `qwen3_omni_moe_thinker`",
}


def why_not(family: str) -> str | None:
    """The reason why no tiny model of `family` can be built; `None` if one can."""
    return UNBUILDABLE.get(family)


def build(family: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A new tiny model of `family` in evaluation mode, its floating-point weights in `dtype`."""
    found = catalogue()[family]
    model_class = found.model_class()
    config = tiny_config(found.config_class(), OVERRIDES.get(family, {}))
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{family}: {count:,} parameters, expected at most {MAX_PARAMETERS:,}")
    torch.manual_seed(seed)
    config = tiny_config(found.config_class(), OVERRIDES.get(family, {}))
    model = model_class(config)
    _spread(model)
    for tensor in [*model.parameters(), *model.buffers()]:  # `model.to` would also cast complex to real
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.eval()
    return model


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that holds routed experts as stacked parameters, with its path."""
    for path, module in model.named_modules():
        if type(module).__name__.endswith("Experts") and any(p.dim() >= 2 for p in module.parameters()):
            yield path, module


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Scales experts to unit gain and routers to logits of a few units, and sets the routers' correction biases."""
    for _, experts in experts_modules(model):
        for parameter in experts.parameters():
            if parameter.dim() == 3:
                parameter.normal_(std=min(parameter.shape[1:]) ** -0.5)
    for name, weight in model.named_parameters():
        router = any(word in name for word in ("gate", "router")) and "experts" not in name
        if router and weight.dim() == 2 and EXPERTS in weight.shape:
            weight.normal_(std=0.4)
    named: list[tuple[str, torch.Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            tensor.normal_(std=0.1)
        if name.endswith("tid2eid"):  # the table of hash routers: token id -> experts
            tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(dim=-1)[:, : tensor.shape[1]])
