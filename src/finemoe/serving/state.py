"""State that all endpoints share, and the jobs of a request."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request

from finemoe.serving.detokenizer import ChoiceOutput, Detokenizer, StopStrings
from finemoe.serving.errors import ApiError, bad_value
from finemoe.serving.metrics import Metrics
from finemoe.serving.model_info import ServedModel
from finemoe.serving.protocol import GenerationRequest
from finemoe.serving.request import Admission, NoProgress, ProgressListener, RequestContext, RequestRun
from finemoe.serving.scheduler.job import Job
from finemoe.serving.structured_output import Grammar
from finemoe.serving.tokenizer import PromptEncoder

_MIN_TEMPERATURE = 1e-3  # logits over a smaller one overflow, or leave one token: greedy


class AppState:
    """What the endpoints of one server share.

    Args:
        served: the model.
        progress: gets the tokens and latencies of all requests.
    """

    def __init__(self, served: ServedModel, progress: ProgressListener | None = None) -> None:
        self.served = served
        self.metrics = Metrics(served)
        self.prompts = PromptEncoder(served)
        self.admission = Admission(served.config.capacity, served.config.max_running)
        self._request_context = RequestContext(
            served.worker,
            self.admission,
            served.config.request_timeout_s,
            self.metrics.ended,
            progress or NoProgress(),
        )

    def run(
        self, request: Request, jobs: Sequence[Job], outputs: Sequence[ChoiceOutput], prompt_tokens: int
    ) -> RequestRun:
        """Starts the jobs of a request.

        Raises:
            ApiError: the request is not admitted, or a prompt never fits the cache.
        """
        run = RequestRun(self._request_context, jobs, outputs, prompt_tokens, request.state.arrived_s)
        run.start(request.receive)
        return run


def check_model(served: ServedModel, request: GenerationRequest) -> None:
    """Raises `ApiError` 404 unless the request names the served model."""
    if request.model != served.name:
        raise ApiError(
            404,
            f"model: there is no model {request.model!r}; this server has {served.name!r}",
            param="model",
            code="model_not_found",
        )


def resolve_max_tokens(served: ServedModel, requested: int | None, default: int, prompt_tokens: int, param: str) -> int:
    """The token limit of an answer.

    Args:
        requested: by the client, or `None`.
        prompt_tokens: of the longest prompt.

    Raises:
        ApiError: 400, naming `param`: more than the server allows, or than the context has room for.
    """
    room = served.context_tokens - prompt_tokens
    if requested is None:
        return min(default, served.config.max_output_tokens, room)
    if requested > served.config.max_output_tokens:
        raise bad_value(param, f"{requested} is more than this server's {served.config.max_output_tokens}")
    if requested > room:
        raise bad_value(
            param,
            f"{requested} tokens do not fit after a prompt of {prompt_tokens}: the model's context holds "
            f"{served.context_tokens}",
            "context_length_exceeded",
        )
    return requested


def make_jobs(
    served: ServedModel,
    request: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    logprobs: int | None,
    grammar: Grammar | None = None,
) -> tuple[list[Job], list[ChoiceOutput]]:
    """`n` jobs per prompt, in the order of the response's choices, and the output of each."""
    n = request.n or 1
    temperature = 1.0 if request.temperature is None else request.temperature
    if temperature < _MIN_TEMPERATURE or request.top_p == 0:
        temperature = 0.0
    jobs = [
        Job(
            name="",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=1.0 if request.top_p is None or temperature == 0 else request.top_p,
            seed=None if request.seed is None else (request.seed + i) % 2**63,  # choices must differ
            stop=served.stop_ids,
            logprobs=logprobs,
            constraint=None if grammar is None else grammar.copy(),
        )
        for prompt in prompts
        for i in range(n)
    ]
    outputs = [
        ChoiceOutput(choice, Detokenizer(served.decode), StopStrings(request.stops), served.stop_ids)
        for choice in range(len(jobs))
    ]
    return jobs, outputs
