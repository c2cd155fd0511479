"""An HTTP client that streams answers through OpenAI's own library and times their tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import openai
from openai import AsyncOpenAI

STATUSES = ("finished", "refused", "timeout", "error", "lost")


@dataclass(frozen=True)
class TimedRequest:
    """A request to send."""

    prompt: str | list[int]  # text, or token ids
    max_tokens: int
    at_s: float = 0.0  # when to send it, from the start of the measurement


@dataclass(frozen=True)
class RequestOutcome:
    """How a request ended. Times are in seconds from when it was due.

    `status` is `finished`; `refused` (429); `timeout` (the server's limit); `error`, another error that the server
    reported; or `lost`, an answer without an end.
    """

    number: int  # of the request
    at_s: float  # when it was due
    late_s: float  # after which it was sent
    max_tokens: int
    status: str
    total_s: float
    tokens: int = 0
    finish: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None  # mean over the tokens after the first
    message: str | None = None  # of an error


def is_http_error(error: Exception) -> bool:
    """Whether it comes from the HTTP library, whose errors openai passes on while it streams."""
    return type(error).__module__.partition(".")[0] in {"httpx", "httpx2"}


class Client:
    """Sends requests to one server. An async context that closes its connections.

    Args:
        url: of the server.
        model: its name.
        chat: send prompts as a user's turn of a chat; otherwise as completions.
        timeout_s: after which an answer counts as lost.
    """

    def __init__(self, url: str, model: str, *, chat: bool, timeout_s: float = 900.0) -> None:
        self._client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout_s)
        self._model = model
        self._chat = chat

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def send(self, request: TimedRequest, number: int = 0, due_s: float | None = None) -> RequestOutcome:
        """Sends one request when it is due, and reads its stream to the end.

        Args:
            request: to send.
            number: for the outcome.
            due_s: by `time.perf_counter`; `None` is now.
        """
        due_s = time.perf_counter() if due_s is None else due_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        late_s = time.perf_counter() - due_s
        times_s: list[float] = []
        tokens, finish, message = 0, None, None
        try:
            tokens, finish = await self._stream(request, times_s)
            status = "finished" if finish else "lost"
        except openai.RateLimitError:
            status = "refused"
        except openai.APIError as error:
            reported = isinstance(error, openai.APIStatusError) or error.code is not None
            status = "timeout" if error.code == "request_timeout" else "error" if reported else "lost"
            message = str(error)[:200]
        except Exception as error:
            if not is_http_error(error):
                raise
            status, message = "lost", f"{type(error).__name__}: {error}"[:200]
        timed = status == "finished" and tokens > 1
        return RequestOutcome(
            number,
            request.at_s,
            late_s,
            request.max_tokens,
            status,
            total_s=time.perf_counter() - due_s,
            tokens=tokens,
            finish=finish,
            ttft_s=times_s[0] - due_s if times_s else None,
            tpot_s=(times_s[-1] - times_s[0]) / (tokens - 1) if timed else None,
            message=message,
        )

    async def _stream(self, request: TimedRequest, times_s: list[float]) -> tuple[int, str | None]:
        """Number of tokens, and why the answer ended. Appends the times of all text, and of the end, to `times_s`."""
        finish, tokens = None, 0
        options: dict[str, Any] = {
            "model": self._model,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        stream: Any
        if self._chat:
            turn: Any = {"role": "user", "content": request.prompt}
            stream = await self._client.chat.completions.create(
                messages=[turn], max_completion_tokens=request.max_tokens, **options
            )
        else:
            stream = await self._client.completions.create(
                prompt=request.prompt, max_tokens=request.max_tokens, **options
            )
        async for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                if finish or (choice.delta.content if self._chat else choice.text):
                    times_s.append(time.perf_counter())
        return tokens, finish


async def open_loop(
    client: Client, requests: Sequence[TimedRequest], on_outcome: Callable[[RequestOutcome], None]
) -> None:
    """Sends all requests at their times, however the server keeps up; `on_outcome` gets each as it ends."""
    begin_s = time.perf_counter() + 0.1

    async def one(number: int, request: TimedRequest) -> None:
        on_outcome(await client.send(request, number, begin_s + request.at_s))

    async with asyncio.TaskGroup() as group:
        for number, request in enumerate(requests):
            group.create_task(one(number, request))


async def closed_loop(
    client: Client, requests: Sequence[TimedRequest], clients: int
) -> tuple[list[RequestOutcome], float]:
    """Keeps `clients` requests in flight. Returns all outcomes, and the seconds that they took together."""
    left = iter(enumerate(requests))
    outcomes: list[RequestOutcome] = []

    async def one() -> None:
        for number, request in left:
            outcome = await client.send(request, number)
            outcomes.append(outcome)

    begin_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one())
    return outcomes, time.perf_counter() - begin_s


def complete(url: str, model: str, prompt: list[int], max_tokens: int) -> RequestOutcome:
    """One completion through a connection of its own. Blocks; can run in another process."""

    async def one() -> RequestOutcome:
        async with Client(url, model, chat=False) as client:
            return await client.send(TimedRequest(prompt, max_tokens))

    return asyncio.run(one())
