"""What the endpoints share: one of each, for as long as the server runs."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request

from finemoe.serving.detokenizer import Answer, Detokenizer, StopStrings
from finemoe.serving.errors import ApiError, bad_value
from finemoe.serving.metrics import Metrics
from finemoe.serving.model_info import Served
from finemoe.serving.protocol import Generation
from finemoe.serving.request import Admission, NoProgress, ProgressListener, RequestContext, RequestRun
from finemoe.serving.scheduler.job import Job
from finemoe.serving.structured_output import Grammar
from finemoe.serving.tokenizer import PromptEncoder


class AppState:
    """A server's inside.

    Args:
        served: the model.
        progress: is told of tokens as they come.
    """

    def __init__(self, served: Served, progress: ProgressListener | None = None) -> None:
        self.served = served
        self.metrics = Metrics(served)
        self.prompts = PromptEncoder(served)
        self.admission = Admission(served.config.capacity, served.config.max_running)
        self._shelter = RequestContext(
            served.worker,
            self.admission,
            served.config.request_timeout_s,
            self.metrics.ended,
            progress or NoProgress(),
        )

    def run(self, request: Request, jobs: Sequence[Job], answers: Sequence[Answer], prompt_tokens: int) -> RequestRun:
        """Start the answers to a request."""
        running = RequestRun(self._shelter, jobs, answers, prompt_tokens, request.state.arrived_s)
        running.start(request.receive)
        return running


_GREEDY_BELOW = 1e-3  # dividing logits by less leaves nothing but the likeliest token, or an overflow


def refuse_other_model(served: Served, request: Generation) -> None:
    """Raises `ApiError` 404 unless the request names the model that is served."""
    if request.model != served.name:
        raise ApiError(
            404,
            f"model: there is no {request.model!r} here, only {served.name!r}",
            param="model",
            code="model_not_found",
        )


def answer_tokens(served: Served, asked: int | None, default: int, longest_prompt: int, param: str) -> int:
    """The most tokens that an answer may have.

    Raises:
        ApiError: 400, naming `param`: more was asked for than the server allows, or the context holds.
    """
    room = served.context_tokens - longest_prompt
    if asked is None:
        return min(default, served.config.max_output_tokens, room)
    if asked > served.config.max_output_tokens:
        raise bad_value(param, f"{asked} is more than this server's {served.config.max_output_tokens}")
    if asked > room:
        raise bad_value(
            param,
            f"{asked} tokens do not fit behind a prompt of {longest_prompt}: the model's context holds "
            f"{served.context_tokens}",
            "context_length_exceeded",
        )
    return asked


def plan(
    served: Served,
    request: Generation,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    logprobs: int | None,
    grammar: Grammar | None = None,
) -> tuple[list[Job], list[Answer]]:
    """`n` jobs for each prompt, in the order of the response's choices, and what becomes of each."""
    n = request.n or 1
    temperature = 1.0 if request.temperature is None else request.temperature
    if temperature < _GREEDY_BELOW or request.top_p == 0:
        temperature = 0.0
    jobs = [
        Job(
            name="",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=1.0 if request.top_p is None or temperature == 0 else request.top_p,
            seed=None if request.seed is None else (request.seed + i) % 2**63,  # choices are to differ
            stop=served.stop_ids,
            logprobs=logprobs,
            constraint=None if grammar is None else grammar.copy(),
        )
        for prompt in prompts
        for i in range(n)
    ]
    answers = [
        Answer(choice, Detokenizer(served.decode), StopStrings(request.stops), served.stop_ids)
        for choice in range(len(jobs))
    ]
    return jobs, answers
