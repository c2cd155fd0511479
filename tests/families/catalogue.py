"""Lists the mixture-of-experts families of the installed transformers.

A *family* is a `model_type` whose text-generating class is in a modelling file with routed experts. Modelling files are
recognised by the decorator that dispatches experts; the few with routed experts and no decorator are listed below.
Files are searched as text: importing every one takes ten seconds.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

DECORATOR = "@use_experts_implementation"

# Routed experts whose class does not carry the decorator.
UNDECORATED = frozenset(
    {"dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"}
)

# Searched in this order; the first class found for a model type is the family's. The multimodal class comes before the
# text-only one: published checkpoints are of the former, and the text model has a model type of its own.
MAPPINGS: tuple[Mapping[str, Any], ...] = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)


@dataclass(frozen=True)
class Family:
    """A family and the place of its model class, which is imported on use."""

    name: str
    module: str
    class_name: str
    decorated: bool

    def model_class(self) -> type[PreTrainedModel]:
        found: type[PreTrainedModel] = getattr(importlib.import_module(self.module), self.class_name)
        return found

    def config_class(self) -> type[PreTrainedConfig]:
        return cast("type[PreTrainedConfig]", self.model_class().config_class)


@cache
def catalogue() -> dict[str, Family]:
    """Every family of the installed transformers, by model type, sorted."""
    found: dict[str, Family] = {}
    models = Path(transformers.__file__).parent / "models"
    for path in sorted(models.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        decorated = DECORATOR in source
        if not decorated and path.parent.name not in UNDECORATED:
            continue
        classes = set(re.findall(r"^class (\w+)\(", source, flags=re.MULTILINE))
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        for name, class_name in _generating(classes):
            found.setdefault(name, Family(name, module, class_name, decorated))
    return dict(sorted(found.items()))


def _generating(classes: set[str]) -> list[tuple[str, str]]:
    """The (model type, class name) pairs of the auto mappings that are among `classes`, each model type once."""
    pairs: dict[str, str] = {}
    for mapping in MAPPINGS:
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                if name in classes:
                    pairs.setdefault(model_type, name)
    causal = {name for name in pairs.values() if not name.endswith("Classification")}
    return [(kind, name) for kind, name in pairs.items() if not causal or name in causal]
