"""Text generation with a loaded model: tokenizes a prompt or conversation, streams the answer, and times it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase, TextStreamer

from finemoe.config import GenerateConfig, refuse_undecodable
from finemoe.engine.expert_layer import HANDLE
from finemoe.errors import CheckpointError, ConfigError
from finemoe.model.introspect import context_tokens
from finemoe.model.reply import Reply, fitting_tokens


class _Stream(TextStreamer):
    """Calls back with text as it becomes printable, and records the time of each token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None], on_token: Callable[[], None]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times_s: list[float] = []
        self._on_text = on_text
        self._on_token = on_token
        self._is_prompt = True  # `generate` puts the prompt first

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self.times_s.append(time.perf_counter())
            self._on_token()
        self._is_prompt = False
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002
        if text:
            self._on_text(text)


class _FiniteLogits(LogitsProcessor):
    """Returns logits unchanged; raises `CheckpointError` if no token can be chosen from them (NaN, or all `-inf`)."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - transformers' signature
        if not bool(torch.isfinite(scores.amax(dim=-1)).all()):  # single tokens may be masked by -inf
            raise CheckpointError(
                f"{self._name}: the model's logits are not finite; the checkpoint is damaged (fetch it again), or "
                "its values overflow --dtype (give another)"
            )
        return scores


def finite_logits(model: Any) -> LogitsProcessorList:
    """A logits processor for `generate` that raises `CheckpointError` if logits are not finite (a damaged model)."""
    return LogitsProcessorList([_FiniteLogits(model.finemoe.checkpoint.name)])


def sampling_options(config: GenerateConfig) -> dict[str, Any]:
    """Arguments of `generate`: greedy at temperature 0, else sampling, whatever the model's own defaults are.

    A penalty or `min_p` that is not set stays the model's own.
    """
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(config, name):
            raise ConfigError(f"--{name.replace('_', '-')}: transformers has none; give --repetition-penalty")
    own: dict[str, Any] = {} if config.repetition_penalty is None else {"repetition_penalty": config.repetition_penalty}
    if config.temperature > 0:
        if config.min_p:
            own["min_p"] = config.min_p
        return {
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
        } | own
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | own


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        CheckpointError: it has none, or transformers can't load it.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: can't load its tokenizer ({str(error).splitlines()[0]})") from error


def encode(tokenizer: Any, prompt: str | Sequence[dict[str, str]], *, raw: bool = False) -> torch.Tensor:
    """Token ids `[1, T]` of a conversation or a prompt. With a chat template, a prompt is one user turn.

    Args:
        tokenizer: transformers' own.
        prompt: text, or the turns of a conversation (`role`, `content`).
        raw: encode text without the chat template.

    Raises:
        CheckpointError: the chat template fails, or is missing for a conversation.
        ConfigError: the prompt is not valid text.
    """
    refuse_undecodable(prompt if isinstance(prompt, str) else prompt[-1]["content"], "PROMPT")
    if not isinstance(prompt, str) or (tokenizer.chat_template and not raw):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        encoded = _templated(tokenizer, turns)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def _templated(tokenizer: Any, turns: list[dict[str, str]]) -> Any:
    where = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise CheckpointError(f"{where}: has no chat template for a conversation; use finemoe generate")
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{where}: its chat template fails ({reason}); repair it, or use finemoe generate --raw"
        ) from error


class Session:
    """A model and its tokenizer.

    Args:
        model: from `finemoe.load`.

    Raises:
        CheckpointError: the model's folder has no usable tokenizer.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokenizer = load_tokenizer(model.finemoe.checkpoint.folder)
        self.context_tokens = context_tokens(model.config)  # prompt and answer together; None: no limit

    def prompt_ids(self, prompt: str | Sequence[dict[str, str]], *, raw: bool = False) -> torch.Tensor:
        """Token ids `[1, T]` of a conversation or a prompt, by `encode`."""
        return encode(self.tokenizer, prompt, raw=raw)

    def reply(
        self,
        prompt: str | Sequence[dict[str, str]],
        config: GenerateConfig,
        on_text: Callable[[str], None] = lambda _: None,
        *,
        prefill_chunk: int | None = None,
        progress: bool = False,
    ) -> Reply:
        """Generates an answer to `prompt`.

        Args:
            prompt: text, or the turns of a conversation (`role`, `content`).
            config: length and sampling.
            on_text: called with new text as soon as it is printable.
            prefill_chunk: tokens of the prompt per forward pass; `None`: all in one.
            progress: show a progress bar on standard error until the first token.

        Raises:
            ConfigError: the prompt is empty, or leaves no room for an answer in the model's context.
            CheckpointError: the chat template fails, or the model's logits are not finite.
        """
        ids = self.prompt_ids(prompt, raw=config.raw).to(self.model.device)
        if not ids.shape[1]:
            raise ConfigError("PROMPT: is empty; there is nothing to continue")
        max_new_tokens = fitting_tokens(self.context_tokens, ids.shape[1], config.max_new_tokens)
        if config.temperature > 0:
            torch.manual_seed(config.seed)
        self.model.finemoe.reset_stats()
        with ExitStack() as prefill:
            if progress:
                self._show_prefill(prefill)
            stream = _Stream(self.tokenizer, on_text, prefill.close)
            start_s = time.perf_counter()
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                logits_processor=finite_logits(self.model),
                streamer=stream,
                pad_token_id=self.pad_token_id(),
                prefill_chunk_size=prefill_chunk,
                **sampling_options(config),
            )
            total_s = time.perf_counter() - start_s
        new = output[0, ids.shape[1] :].tolist()
        times_s = stream.times_s
        return Reply(
            text=self.tokenizer.decode(new, skip_special_tokens=True),
            token_ids=new,
            prompt_tokens=ids.shape[1],
            finish_reason="length" if len(new) == max_new_tokens else "stop",
            ttft_s=times_s[0] - start_s,
            tpot_s=(times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else 0.0,
            total_s=total_s,
            stats=self.model.finemoe.stats(),
        )

    def pad_token_id(self) -> int | None:
        """A padding id for `generate`. One prompt has no padding, but transformers warns if none is given."""
        end = self.model.generation_config.eos_token_id
        own = self.tokenizer.pad_token_id
        chosen = own if own is not None else end[0] if isinstance(end, list) else end
        return None if chosen is None else int(chosen)

    def _show_prefill(self, until_first_token: ExitStack) -> None:
        """Shows a progress bar over the MoE layers of the prompt's forward pass."""
        modules = [module for module in self.model.modules() if HANDLE in module.__dict__]
        bar = until_first_token.enter_context(
            tqdm(total=len(modules), desc="Reading prompt", unit="layer", leave=False, delay=1)
        )

        def advance(*_: object) -> None:
            bar.update()

        for module in modules:
            until_first_token.callback(module.register_forward_hook(advance).remove)
