"""Transformers' continuous batching, a step at a time: its scheduler, its paged key-value cache, its inputs.

Everything that finemoe knows of `transformers.generation.continuous_batching` stands here. It is driven below its
manager's thread, which samples all requests alike and fails them together; these parts are not promised to stay as
they are. Tried with transformers 5.17, 5.18, 5.20, 5.22 and 5.23.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import fields
from math import ceil
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from finemoe.config import format_bytes
from finemoe.errors import ConfigError, UnsupportedModelError
from finemoe.model import context_tokens

PAGE_TOKENS = 32  # of a block; answers whose prompts begin alike share whole blocks
_TRIED = "5.17 to 5.23"


class Part(NamedTuple):
    """What one request brings to a forward pass. Parts lie one after the other in its row `[1, T]`."""

    name: str
    tokens: int
    prompt: bool  # tokens of its prompt, and not the one that it chose last
    fresh: bool  # it begins: nothing that was computed for it is used, but what other prompts left
    answers: bool  # its last token's logits say what comes next


class PagedBatch:
    """Requests that run together on one model. Not safe to call from two threads.

    The model attends to the paged cache from now on, until `close`.

    Args:
        model: of transformers.
        cache_bytes: the most that the key-value cache and the masks over it take.
        max_batch_tokens: of one forward pass; longer prompts take several.
        max_running: requests in one forward pass.

    Raises:
        ConfigError: the cache is too small for anything.
        UnsupportedModelError: this model, or this version of transformers, can't run so.
    """

    def __init__(self, model: Any, cache_bytes: int, max_batch_tokens: int, max_running: int) -> None:
        self._model = model
        self._attention = model.config._attn_implementation  # noqa: SLF001 - what `set_attn_implementation` sets
        self._states: dict[str, Any] = {}  # the request state that each name was last seen with
        config = model.config.get_text_config()
        _check(model, config)
        self._processor: Any = None
        try:
            self._processor, self.blocks = _processor(model, config, cache_bytes, max_batch_tokens, max_running)
            self._scheduler, self._cache = self._processor.scheduler, self._processor.cache
            self._allocators = list(_allocators(self._cache))
            self.capacity_tokens = min(self.blocks * PAGE_TOKENS, _capacity_tokens(self._cache))
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> int:
        """Requests that hold a part of the cache."""
        return len(self._scheduler.active_requests)

    @property
    def used_blocks(self) -> int:
        """Blocks of the cache that running requests hold. What finished ones left for others to use is free."""
        held = [{block for table in each.block_table.values() for block in table} for each in self._allocators]
        return min(self.blocks, max(map(len, held)))

    def add(self, name: str, prompt: Sequence[int]) -> None:
        """Let a request wait for its first pass. It has at most `capacity_tokens`, the answer's included."""
        from transformers.generation.continuous_batching.requests import RequestState

        self._scheduler.add_waiting_request(RequestState(name, list(prompt), max_new_tokens=None))

    def remove(self, name: str) -> None:
        """Forget a request and free its blocks; unknown names are ignored."""
        self._states.pop(name, None)
        self._scheduler.set_request_cancellation(name)
        self._scheduler.clear_cancelled_requests()
        self._scheduler.block_new_requests = False  # there is room again

    def prepare(self) -> list[Part]:
        """Choose what the next pass computes; nothing if nothing waits.

        Raises:
            RuntimeError: requests wait, and none can be scheduled; only `clear` helps.
        """
        if not self._processor.prepare_next_batch():
            if self._processor.has_pending_requests():
                raise RuntimeError("requests wait, and transformers schedules none")
            return []
        return [self._part(future) for future in self._processor.inputs_and_outputs.requests_in_batch]

    def run(self) -> Tensor:
        """The pass that was prepared: float32 logits `[n, V]` of the parts that answer, in their order."""
        inputs = self._processor.inputs_and_outputs.get_model_kwargs()
        answering = sum(f.has_new_token for f in self._processor.inputs_and_outputs.requests_in_batch)
        wanted = inputs["logits_indices"][:answering].long()
        sliced = slices_logits(self._model)
        if sliced:
            inputs["logits_to_keep"] = wanted
        with torch.no_grad():
            logits: Tensor = self._model(**inputs).logits[0]
        return (logits if sliced else logits[wanted]).float()

    def advance(self, tokens: Sequence[int]) -> None:
        """The pass is over, and these tokens come next: one for each part that answers, in their order."""
        chosen = torch.tensor(tokens, dtype=torch.int32)
        self._processor.inputs_and_outputs.output_ids[0, : len(tokens)] = chosen
        self._processor.update_batch()

    def clear(self) -> None:
        """Forget all requests."""
        self._states.clear()
        self._processor.reset()

    def close(self) -> None:
        """The model runs as before, and the cache is gone. Nothing else may be called any more."""
        self._model.set_attn_implementation(self._attention)
        self._processor = self._scheduler = self._cache = None
        self._allocators = []

    def _part(self, future: Any) -> Part:
        state = future.state
        name: str = state.request_id
        fresh = self._states.get(name) is not state  # also one that had to make room and starts over
        self._states[name] = state
        return Part(name, future.query_length, not state.generated_tokens, fresh, future.has_new_token)


def _check(model: Any, config: Any) -> None:
    """Refuses models that the paged cache would get wrong, or can't hold."""
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError("this model keeps a state beside its key-value cache; answers can't be batched")
    if not getattr(model, "_supports_attention_backend", True):
        raise UnsupportedModelError("this model brings attention of its own; answers can't be batched")
    width = _head_width(config)
    for name in ("qk_head_dim", "v_head_dim"):
        if getattr(config, name, width) != width:
            raise UnsupportedModelError(
                f"this model's keys and values are not of one width ({name} is {getattr(config, name)}); transformers' "
                "paged cache can't hold them, so answers can't be batched"
            )


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def slices_logits(model: Any) -> bool:
    """Whether the model computes logits only where it is told to (`logits_to_keep`)."""
    return bool(model._supports_logits_to_keep())  # noqa: SLF001 - as transformers' own batching asks


def token_bytes(model: Any) -> int:
    """What the key-value cache takes for a token, at most: as if every layer kept keys and values of it."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if isinstance(heads, list | tuple):  # one number for each layer
        heads = max(heads)
    width = max(getattr(config, name, None) or 0 for name in ("qk_head_dim", "v_head_dim")) or _head_width(config)
    return int(config.num_hidden_layers * 2 * heads * width * model.dtype.itemsize)


def _processor(model: Any, config: Any, cache_bytes: int, max_batch_tokens: int, max_running: int) -> tuple[Any, int]:
    """Transformers' processor over the largest cache that the budget pays for; and its blocks, all layers' together."""
    try:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        known = {field.name for field in fields(ContinuousBatchingConfig)}
        page = "page_size" if "page_size" in known else "block_size"
        mask_bytes = max_batch_tokens * model.dtype.itemsize  # of each token of the cache
        block_bytes = (token_bytes(model) + mask_bytes) * PAGE_TOKENS
        context = context_tokens(config) or cache_bytes
        blocks = min(cache_bytes // block_bytes, max_running * ceil(context / PAGE_TOKENS))  # no more than can be used
        groups = 1
        while blocks > 0:
            settings: dict[str, Any] = {
                page: PAGE_TOKENS,
                "num_blocks": blocks * groups,
                "max_batch_tokens": max_batch_tokens,
                "max_requests_per_batch": max_running,
                "max_blocks_per_request": 0,
                "use_async_batching": False,
                "use_cuda_graph": False,
            }
            if "auto_switch_to_flash" in known:
                settings["auto_switch_to_flash"] = False
            manager = model.init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=-1), ContinuousBatchingConfig(**settings)
            )
            processor = manager._create_batch_processor()  # noqa: SLF001 - it alone knows every version's arguments
            if getattr(processor.cache, "num_groups", 1) != groups:  # older ones count the blocks of a group of layers
                groups = processor.cache.num_groups
                continue
            excess_bytes = _allocated_bytes(processor) - cache_bytes
            if excess_bytes <= 0:
                return processor, blocks
            blocks -= ceil(excess_bytes / block_bytes)
    except (AttributeError, ImportError, TypeError) as error:
        raise UnsupportedModelError(
            f"continuous batching of transformers {transformers.__version__} is not as finemoe knows it ({error}); "
            f"install a version from {_TRIED}"
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers can't batch answers of this model ({str(error).splitlines()[0]})"
        ) from error
    raise ConfigError(
        f"--cache-bytes: {format_bytes(cache_bytes)} holds too few tokens; this model takes "
        f"{format_bytes(token_bytes(model))} each, in blocks of {PAGE_TOKENS}, and masks that grow with "
        "--max-batch-tokens"
    )


def _allocated_bytes(processor: Any) -> int:
    """Of the cache, and of the masks over all of it that every pass may need."""
    whole = getattr(processor.cache, "cache_tensor", None)
    tensors = [whole] if whole is not None else [*processor.cache.key_cache, *processor.cache.value_cache]
    masks = processor.inputs_and_outputs.attention_mask or {}
    return sum(tensor.nbytes for tensor in [*tensors, *masks.values()])


def _allocators(cache: Any) -> Sequence[Any]:
    by_kind = getattr(cache, "cache_allocators", None)
    return list(by_kind.values()) if by_kind is not None else list(cache.group_cache_managers)


def _capacity_tokens(cache: Any) -> int:
    """The longest request that an empty cache can hold."""
    if not hasattr(cache, "can_store_request_tokens"):
        return int(cache.num_blocks // cache.num_groups * cache.block_size)
    from transformers.generation.continuous_batching.requests import RequestState

    nobody = RequestState("", [])
    lengths = range(1, cache.max_tokens_read + 1)
    return bisect_left(lengths, True, key=lambda n: not cache.can_store_request_tokens(nobody, n, dry_run=True))  # noqa: FBT003
