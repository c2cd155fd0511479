"""Records routing: runs prompts through an offloaded model with its routers tapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from finemoe.checkpoint import read_headers
from finemoe.checkpoint.headers import fingerprint
from finemoe.config import GenerateConfig
from finemoe.errors import UnsupportedModelError
from finemoe.model.generation import Session, finite_logits, sampling_options
from finemoe.model.router_hooks import RecordedPass, RouterTap, Scale, infer_scale
from finemoe.trace.format import OPTIONAL, RequestTrace, TraceHeader
from finemoe.types import DECODE, PREFILL

_PROBE_TOKENS = 4
_NORMALISATIONS: dict[Scale, str] = {  # as written to the trace's header
    "softmax": "softmax of the gates' logits",
    "sigmoid": "sigmoid of the gates' logits, divided by its sum",
    "scores": "the gates' own scores, divided by their sum",
}


class Recorder:
    """Records requests of one model, a batch at a time.

    Args:
        session: with a model from `finemoe.load`.
        config: length and sampling of the answers.
        lookahead: `n`, for how many layers ahead to run and record the gates.
        settings: written to the trace's header.

    Raises:
        ConfigError: the lookahead can't be recorded.
        UnsupportedModelError: the model's routing can't be recorded.
    """

    def __init__(
        self, session: Session, config: GenerateConfig, lookahead: int = 0, settings: dict[str, Any] | None = None
    ) -> None:
        self._session = session
        self._model = session.model
        self._config = config
        self._tap = RouterTap(self._model, lookahead)
        self.notices: list[str] = []  # fields that can't be recorded, and why; for the user
        self.header = self._probe(settings or {})
        if config.temperature > 0:
            torch.manual_seed(config.seed)

    def record(
        self, prompts: Sequence[Tensor], batch: int, on_token: Callable[[], None] = lambda: None
    ) -> list[RequestTrace]:
        """Answers prompts as one batch, and returns the routing of each.

        Args:
            prompts: token ids `[1, T]` each; shorter ones are padded on the left, and padding is not recorded.
            batch: the id of this batch in the trace.
            on_token: called after every forward pass.

        Raises:
            UnsupportedModelError: the model does not generate one token per pass.
            CheckpointError: its logits are not finite.
        """
        lengths = [prompt.shape[1] for prompt in prompts]
        longest = max(lengths)
        pad = self._session.pad_token_id()
        ids = torch.full((len(prompts), longest), pad or 0, device=self._model.device)
        mask = torch.zeros_like(ids)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            ids[row, longest - length :] = prompt[0]
            mask[row, longest - length :] = 1
        with self._tap.recording():
            output = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=self._config.max_new_tokens,
                pad_token_id=pad,
                num_beams=1,
                logits_processor=finite_logits(self._model),
                stopping_criteria=StoppingCriteriaList([_EveryToken(on_token)]),
                **sampling_options(self._config),
            )
        new = output[:, longest:].cpu()
        passes = self._take(len(prompts), longest, new.shape[1])
        steps = [self._steps(row.tolist()) for row in new]
        return [self._request(passes[: steps[b]], b, longest - lengths[b], batch) for b in range(len(prompts))]

    def record_call(self, answer: Callable[[], int], prompt_tokens: int) -> RequestTrace:
        """The routing of one request that the caller runs: a pass for its prompt, then one for each token but the last.

        Args:
            answer: runs the request, and returns the number of generated tokens.
            prompt_tokens: of the prompt.
        """
        with self._tap.recording():
            tokens = answer()
        return self._request(self._take(1, prompt_tokens, tokens), 0, 0, 0)

    def _take(self, requests: int, longest: int, tokens: int) -> list[RecordedPass]:
        """The recorded passes of a batch: the prompts, padded to `longest` tokens, then one token a pass."""
        passes = self._tap.take()
        shapes = [tuple(each.token_ids.shape) for each in passes]
        if shapes != [(requests, longest)] + [(requests, 1)] * (tokens - 1):
            raise UnsupportedModelError(f"{self.header.model} does not generate one token a pass; it can't be recorded")
        return passes

    def _probe(self, settings: dict[str, Any]) -> TraceHeader:
        """Runs a short forward pass to find out which fields can be recorded."""
        ids = torch.arange(1, 1 + _PROBE_TOKENS, device=self._model.device)[None]
        with self._tap.recording(), torch.no_grad():
            self._model(input_ids=ids, attention_mask=torch.ones_like(ids))
        passes = self._tap.take()
        if not passes:
            raise UnsupportedModelError("this model does not use its input embeddings; it can't be recorded")
        ran = passes[0]
        fields = {"batch", "weights", "embeddings"}
        normalisation = None
        if ran.scores is None:
            self.notices.append("probs: this model's gates can't be tapped, so distributions are marked missing")
        else:
            fields |= {"probs", "lookahead"} if self._tap.lookahead else {"probs"}
            self._tap.scale, proven = infer_scale(ran.scores, ran.ids, ran.weights)
            normalisation = _NORMALISATIONS[self._tap.scale] + (
                "" if proven else "; the weights neither prove nor refute it"
            )
        checkpoint = self._model.finemoe.checkpoint
        folder = Path(checkpoint.name).expanduser()
        return TraceHeader(
            model=folder.resolve().name if folder.is_dir() else checkpoint.name,
            layers=self._tap.layers,
            experts=self._tap.experts,
            active=ran.ids.shape[2],
            width=ran.embedding.shape[2],
            lookahead=self._tap.lookahead if "lookahead" in fields else 0,
            fields=tuple(name for name in OPTIONAL if name in fields),
            fingerprint=fingerprint(checkpoint.folder, read_headers(checkpoint.files)),
            normalisation=normalisation,
            settings=settings,
        )

    def _steps(self, new: list[int]) -> int:
        """Passes of a request: one for each token up to end-of-sequence; padding follows."""
        eos = self._model.generation_config.eos_token_id
        eos_ids = set(eos if isinstance(eos, list) else [eos])
        return next((step for step, token in enumerate(new, 1) if token in eos_ids), len(new))

    def _request(self, passes: Sequence[RecordedPass], row: int, padding: int, batch: int) -> RequestTrace:
        """Extracts one request from the passes of its batch."""
        own = [_rows(each, row, padding if step == 0 else 0) for step, each in enumerate(passes)]

        def cut(table: Callable[[RecordedPass], Tensor]) -> list[Tensor]:
            return [table(each)[rows] for each, rows in zip(passes, own, strict=True)]

        header = self.header
        ids = torch.cat(cut(lambda each: each.ids)).numpy()
        embedded = cut(lambda each: each.embedding.flatten(0, 1))
        return RequestTrace(
            phases=np.array([PREFILL] + [DECODE] * (len(passes) - 1), np.uint8),
            rows=np.cumsum([0, *map(len, embedded)]),
            token_ids=torch.cat(cut(lambda each: each.token_ids.flatten())).numpy(),
            expert_ids=np.where(ids < header.experts, ids, header.sentinel),
            weights=torch.cat(cut(lambda each: each.weights)).half().numpy(),
            probs=_numpy([each.scores for each in passes], own) if "probs" in header.fields else None,
            embeddings=torch.stack([rows.float().mean(0) for rows in embedded]).half().numpy(),
            lookahead=_numpy([each.ahead for each in passes], own) if header.lookahead else None,
            batch=batch,
        )


class _EveryToken(StoppingCriteria):
    """Never stops generation; calls back after each token."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002 - transformers' interface
        self._callback()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _rows(each: RecordedPass, row: int, padding: int) -> slice:
    """A request's rows of a pass `[B, S]`, flattened."""
    length = each.token_ids.shape[1]
    return slice(row * length + padding, (row + 1) * length)


def _numpy(tables: Sequence[Tensor | None], rows: Sequence[slice]) -> NDArray[np.float16]:
    """Concatenates each pass's rows of its table, which must not be `None`."""
    recorded = [table[own] for table, own in zip(tables, rows, strict=True) if table is not None]
    joined: NDArray[np.float16] = torch.cat(recorded).numpy()
    return joined
