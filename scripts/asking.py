"""Sends requests to a server by OpenAI's own client, streams the answers, and notes when they came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import openai
from arrivals import Ask
from openai import AsyncOpenAI

Answered = dict[str, Any]


def of_http(error: Exception) -> bool:
    """Whether it is the HTTP library's: openai lets those of a stream through. Which library that is, is its choice."""
    return type(error).__module__.partition(".")[0] in {"httpx", "httpx2"}


class Asker:
    """Asks one server. An async context: it closes its connections.

    Args:
        url: of the server.
        model: its name.
        chat: whether prompts are a user's turn; else they are texts to be continued.
        timeout_s: after which an answer is given up, as lost.
    """

    def __init__(self, url: str, model: str, *, chat: bool, timeout_s: float = 900.0) -> None:
        self._client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout_s)
        self._model = model
        self._chat = chat

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, ask: Ask, due_s: float | None = None) -> Answered:
        """One request, streamed.

        Args:
            ask: what to send.
            due_s: when, by `time.perf_counter`; all times count from then. Default: now.

        Returns:
            `status`: `finished`, `refused` (429), `timeout` (the server's), `error` (any other answer that says so) or
            `lost`, of which the client heard no end; `late_s`: after its time it was sent; `ttft_s`, `tpot_s`: as in
            the field; `total_s`; `tokens`.
        """
        due_s = time.perf_counter() if due_s is None else due_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        row: Answered = {"at_s": ask.at_s, "late_s": time.perf_counter() - due_s, "max_tokens": ask.max_tokens}
        times_s: list[float] = []
        try:
            row |= await self._stream(ask, times_s)
        except openai.RateLimitError:
            row |= {"status": "refused"}
        except openai.APIError as error:
            timeout = getattr(error, "code", None) == "request_timeout"
            told = isinstance(error, openai.APIStatusError) or error.code is not None
            row |= {"status": "timeout" if timeout else "error" if told else "lost", "message": str(error)[:200]}
        except Exception as error:
            if not of_http(error):
                raise
            row |= {"status": "lost", "message": f"{type(error).__name__}: {error}"[:200]}
        row["total_s"] = time.perf_counter() - due_s
        if times_s:
            row["ttft_s"] = times_s[0] - due_s
            if row["status"] == "finished" and row["tokens"] > 1:
                row["tpot_s"] = (times_s[-1] - times_s[0]) / (row["tokens"] - 1)
        return row

    async def _stream(self, ask: Ask, times_s: list[float]) -> Answered:
        """Fills `times_s` with when text came, the end included: the last token may have none."""
        finish, tokens = None, 0
        given: dict[str, Any] = {
            "model": self._model,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._chat:
            turn = {"role": "user", "content": ask.prompt}
            stream = await self._client.chat.completions.create(
                messages=[turn], max_completion_tokens=ask.max_tokens, **given
            )
        else:
            stream = await self._client.completions.create(prompt=ask.prompt, max_tokens=ask.max_tokens, **given)
        async for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                if finish or (choice.delta.content if self._chat else choice.text):
                    times_s.append(time.perf_counter())
        return {"status": "finished" if finish else "lost", "finish": finish, "tokens": tokens}


async def play(asker: Asker, asks: Sequence[Ask], heard: Callable[[Answered], None]) -> None:
    """Send all of them at their times, whatever becomes of the others; `heard` gets each when it has ended."""
    begin_s = time.perf_counter() + 0.1

    async def one(number: int, ask: Ask) -> None:
        heard({"number": number} | await asker.ask(ask, begin_s + ask.at_s))

    async with asyncio.TaskGroup() as group:
        for number, ask in enumerate(asks):
            group.create_task(one(number, ask))


async def in_turn(asker: Asker, asks: Sequence[Ask], clients: int) -> tuple[list[Answered], float]:
    """So many clients, each of which sends its next when its last has ended. Answers, and the seconds of all."""
    left = iter(asks)
    rows: list[Answered] = []

    async def client() -> None:
        for ask in left:
            row = await asker.ask(ask)
            rows.append(row)

    begin_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return rows, time.perf_counter() - begin_s


def ask_alone(url: str, model: str, prompt: list[int], max_tokens: int) -> Answered:
    """One completion, by a client of its own."""

    async def one() -> Answered:
        async with Asker(url, model, chat=False) as asker:
            return await asker.ask(Ask(0.0, prompt, len(prompt), max_tokens))

    return asyncio.run(one())
