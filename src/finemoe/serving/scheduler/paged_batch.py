"""Continuous batching with a paged key-value cache, built on transformers' scheduler, cache and input preparation.

All of finemoe's dependence on `transformers.generation.continuous_batching` is in this module. It bypasses that
package's manager thread, which samples all requests alike and fails them together, and uses its parts directly; these
are not a stable API. Tested with transformers 5.17, 5.18, 5.20, 5.22 and 5.23.
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

from finemoe.budget import format_bytes
from finemoe.errors import ConfigError, UnsupportedModelError
from finemoe.model import context_tokens

BLOCK_TOKENS = 32  # tokens of a cache block; requests with a common prefix share its full blocks
_TESTED_VERSIONS = "5.17 to 5.23"


class ScheduledRequest(NamedTuple):
    """The tokens of one request in a forward pass. A pass concatenates its requests in one row `[1, T]`."""

    name: str
    tokens: int
    is_prefill: bool  # prompt tokens, not the last sampled one
    is_new: bool  # the request's first pass, or its first after preemption; a cached prefix may still be reused
    samples: bool  # the logits of its last token give a next token


class PagedBatch:
    """Requests that share forward passes of one model. Not thread-safe.

    The model uses paged attention until `close`.

    Args:
        model: a transformers model.
        cache_bytes: limit of the key-value cache and its attention masks.
        max_batch_tokens: tokens per forward pass; longer prompts are split (chunked prefill).
        max_running: requests per forward pass.

    Raises:
        ConfigError: the cache is too small.
        UnsupportedModelError: this model, or this version of transformers, does not support it.
    """

    def __init__(self, model: Any, cache_bytes: int, max_batch_tokens: int, max_running: int) -> None:
        self._model = model
        self._attention = model.config._attn_implementation  # noqa: SLF001 - what `set_attn_implementation` sets
        self._states: dict[str, Any] = {}  # transformers' state of each request at its last pass
        config = model.config.get_text_config()
        _check(model, config)
        self._processor: Any = None
        try:
            self._processor, self.blocks = _processor(model, config, cache_bytes, max_batch_tokens, max_running)
            self._scheduler, self._cache = self._processor.scheduler, self._processor.cache
            self._allocators = list(_allocators(self._cache))
            self.capacity_tokens = min(self.blocks * BLOCK_TOKENS, _capacity_tokens(self._cache))
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> int:
        """Number of requests that hold cache blocks."""
        return len(self._scheduler.active_requests)

    @property
    def used_blocks(self) -> int:
        """Cache blocks held by running requests; reusable prefix blocks of finished requests count as free."""
        held = [{block for table in each.block_table.values() for block in table} for each in self._allocators]
        return min(self.blocks, max(map(len, held)))

    def add(self, name: str, prompt: Sequence[int]) -> None:
        """Queue a request of at most `capacity_tokens` tokens, its answer included."""
        from transformers.generation.continuous_batching.requests import RequestState

        self._scheduler.add_waiting_request(RequestState(name, list(prompt), max_new_tokens=None))

    def remove(self, name: str) -> None:
        """Drop a request and free its blocks; unknown names are ignored."""
        self._states.pop(name, None)
        self._scheduler.set_request_cancellation(name)
        self._scheduler.clear_cancelled_requests()
        self._scheduler.block_new_requests = False  # its blocks are free now

    def prepare(self) -> list[ScheduledRequest]:
        """Schedule the next pass; empty if no request waits or runs.

        Raises:
            RuntimeError: requests wait, and none can be scheduled; only `clear` recovers.
        """
        if not self._processor.prepare_next_batch():
            if self._processor.has_pending_requests():
                raise RuntimeError("requests wait, and transformers schedules none of them")
            return []
        return [self._scheduled(future) for future in self._processor.inputs_and_outputs.requests_in_batch]

    def run(self) -> Tensor:
        """Run the prepared pass. Returns float32 logits `[n, V]` of the requests with `samples`, in order."""
        inputs = self._processor.inputs_and_outputs.get_model_kwargs()
        sampling = sum(f.has_new_token for f in self._processor.inputs_and_outputs.requests_in_batch)
        positions = inputs["logits_indices"][:sampling].long()
        sliced = slices_logits(self._model)
        if sliced:
            inputs["logits_to_keep"] = positions
        with torch.no_grad():
            logits: Tensor = self._model(**inputs).logits[0]
        return (logits if sliced else logits[positions]).float()

    def advance(self, tokens: Sequence[int]) -> None:
        """Append the sampled tokens: one for each request with `samples`, in order."""
        sampled = torch.tensor(tokens, dtype=torch.int32)
        self._processor.inputs_and_outputs.output_ids[0, : len(tokens)] = sampled
        self._processor.update_batch()

    def clear(self) -> None:
        """Drop all requests."""
        self._states.clear()
        self._processor.reset()

    def close(self) -> None:
        """Restore the model's own attention and free the cache; no other method may be called afterwards."""
        self._model.set_attn_implementation(self._attention)
        self._processor = self._scheduler = self._cache = None
        self._allocators = []

    def _scheduled(self, future: Any) -> ScheduledRequest:
        state = future.state
        name: str = state.request_id
        is_new = self._states.get(name) is not state  # also true after preemption, which makes a new state
        self._states[name] = state
        return ScheduledRequest(name, future.query_length, not state.generated_tokens, is_new, future.has_new_token)


def _check(model: Any, config: Any) -> None:
    """Refuses models that transformers' paged cache computes wrongly or can't hold."""
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            "this model has recurrent state besides its key-value cache; answers can't be batched"
        )
    if not getattr(model, "_supports_attention_backend", True):
        raise UnsupportedModelError("this model has its own attention code; answers can't be batched")
    width = _head_width(config)
    for name in ("qk_head_dim", "v_head_dim"):
        if getattr(config, name, width) != width:
            raise UnsupportedModelError(
                f"this model's keys and values differ in width ({name} is {getattr(config, name)}); transformers' "
                "paged cache can't hold them, so answers can't be batched"
            )


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def slices_logits(model: Any) -> bool:
    """Whether the model can compute logits at selected positions only (`logits_to_keep`)."""
    return bool(model._supports_logits_to_keep())  # noqa: SLF001 - transformers' own batching calls it too


def token_bytes(model: Any) -> int:
    """Upper bound of the key-value cache per token: as if every layer stored its keys and values."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if isinstance(heads, list | tuple):  # one number per layer
        heads = max(heads)
    width = max(getattr(config, name, None) or 0 for name in ("qk_head_dim", "v_head_dim")) or _head_width(config)
    return int(config.num_hidden_layers * 2 * heads * width * model.dtype.itemsize)


def _processor(model: Any, config: Any, cache_bytes: int, max_batch_tokens: int, max_running: int) -> tuple[Any, int]:
    """Transformers' batch processor with the largest cache that fits `cache_bytes`, and its number of blocks."""
    try:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        known = {field.name for field in fields(ContinuousBatchingConfig)}
        page = "page_size" if "page_size" in known else "block_size"
        mask_bytes = max_batch_tokens * model.dtype.itemsize  # per cached token
        block_bytes = (token_bytes(model) + mask_bytes) * BLOCK_TOKENS
        context = context_tokens(config) or cache_bytes
        blocks = min(cache_bytes // block_bytes, max_running * ceil(context / BLOCK_TOKENS))  # more could never be used
        groups = 1
        while blocks > 0:
            settings: dict[str, Any] = {
                page: BLOCK_TOKENS,
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
            processor = manager._create_batch_processor()  # noqa: SLF001 - its arguments differ by version
            if getattr(processor.cache, "num_groups", 1) != groups:  # older versions count blocks per group of layers
                groups = processor.cache.num_groups
                continue
            excess_bytes = _allocated_bytes(processor) - cache_bytes
            if excess_bytes <= 0:
                return processor, blocks
            blocks -= ceil(excess_bytes / block_bytes)
    except (AttributeError, ImportError, TypeError) as error:
        raise UnsupportedModelError(
            f"continuous batching of transformers {transformers.__version__} has an unknown API ({error}); "
            f"install a version from {_TESTED_VERSIONS}"
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers can't batch answers of this model ({str(error).splitlines()[0]})"
        ) from error
    raise ConfigError(
        f"--cache-bytes: {format_bytes(cache_bytes)} holds too few tokens; this model takes "
        f"{format_bytes(token_bytes(model))} each, in blocks of {BLOCK_TOKENS}, and masks that grow with "
        "--max-batch-tokens"
    )


def _allocated_bytes(processor: Any) -> int:
    """Bytes of the cache and of the attention masks over all of it."""
    joint = getattr(processor.cache, "cache_tensor", None)
    tensors = [joint] if joint is not None else [*processor.cache.key_cache, *processor.cache.value_cache]
    masks = processor.inputs_and_outputs.attention_mask or {}
    return sum(tensor.nbytes for tensor in [*tensors, *masks.values()])


def _allocators(cache: Any) -> Sequence[Any]:
    by_kind = getattr(cache, "cache_allocators", None)
    return list(by_kind.values()) if by_kind is not None else list(cache.group_cache_managers)


def _capacity_tokens(cache: Any) -> int:
    """The longest request, in tokens, that an empty cache can hold."""
    if not hasattr(cache, "can_store_request_tokens"):
        return int(cache.num_blocks // cache.num_groups * cache.block_size)
    from transformers.generation.continuous_batching.requests import RequestState

    empty = RequestState("", [])
    lengths = range(1, cache.max_tokens_read + 1)
    return bisect_left(lengths, True, key=lambda n: not cache.can_store_request_tokens(empty, n, dry_run=True))  # noqa: FBT003
