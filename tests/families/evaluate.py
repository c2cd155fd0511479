"""Computes a model's answers: logits of a left-padded batch, of cached decode steps after it, and of `generate`.

The same function runs the reference and the offloaded model, so that their answers can be compared bit by bit.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tests.families.shrink import SPECIAL

PROMPT_LENGTHS = (5, 9, 12)
DECODE_STEPS = 3
NEW_TOKENS = 4


def prompts(seed: int = 1) -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(PROMPT_LENGTHS), max(PROMPT_LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(PROMPT_LENGTHS):
        ids[row, -length:] = torch.randint(3, SPECIAL, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def answers(model: Any) -> dict[str, torch.Tensor]:
    """Logits by name: `prefill` [B, S, V], `decode` [steps, B, V] and `generate` [steps, B, V]."""
    batch = prompts()
    if model.config.is_encoder_decoder:
        start = torch.full((len(PROMPT_LENGTHS), 1), 2)
        return {"prefill": model(**batch, decoder_input_ids=start).logits}
    if canvas := getattr(model.config, "canvas_length", None):  # a diffusion model: it denoises blocks, in random order
        return {"prefill": model(**batch, decoder_input_ids=batch["input_ids"][:, -canvas:]).logits}
    found = {"prefill": model(**batch, use_cache=True).logits} if not model.can_generate() else _decode(model, batch)
    if model.can_generate():
        found["generate"] = _generate(model, batch)
    return found


def _decode(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prefill, then greedy steps with the cache."""
    out = model(**batch, use_cache=True)
    prefill, steps = out.logits, []
    mask = batch["attention_mask"]
    token = prefill[:, -1].argmax(-1, keepdim=True)
    for _ in range(DECODE_STEPS):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        position = mask.sum(-1, keepdim=True) - 1
        step = {"input_ids": token, "attention_mask": mask, "position_ids": position}
        out = model(**step, past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits[:, -1])
        token = steps[-1].argmax(-1, keepdim=True)
    return {"prefill": prefill, "decode": torch.stack(steps)}


def _generate(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits of greedy `generate`, without an end-of-sequence token."""
    options: dict[str, Any] = {
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_new_tokens": NEW_TOKENS,
    }
    result = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(list(result.logits))
