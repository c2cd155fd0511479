"""Request and response schemas of the API. Unknown parameters are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

# Unsupported parameters of OpenAI's API are accepted with the value that has no effect: many clients send them.
UnsupportedPenalty = Annotated[float | None, Field(ge=0, le=0, description="not supported; must be 0")]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenIds = Annotated[list[int], Field(min_length=1)]
FinishReason = Literal["stop", "length", "tool_calls"]
_INT64 = 2**63


class StrictModel(BaseModel):
    """Base of request schemas: no unknown fields, no type conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(StrictModel):
    """Options of a streamed answer."""

    include_usage: bool = Field(default=False, description="end with a chunk that counts tokens")


class GenerationRequest(StrictModel):
    """Parameters of both generation endpoints."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2, description="default 1; 0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1, description="default 1")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="the same request gets the same answer")
    n: int | None = Field(None, ge=1, le=128, description="answers per prompt; default 1")
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="written into the log")
    frequency_penalty: UnsupportedPenalty = None
    presence_penalty: UnsupportedPenalty = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="not supported")

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("inconsistent", "stream_options: has no effect without stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(StrictModel):
    """A part of a message; text is the only supported kind."""

    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    """The function and arguments of a call; `arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    """A tool call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(StrictModel):
    """A message of the conversation; an earlier answer can be sent back unchanged."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str | None:
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content


class Function(StrictModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = Field(None, description="true is not supported")


class Tool(StrictModel):
    """A tool; functions are the only supported kind."""

    type: Literal["function"]
    function: Function


class FunctionName(StrictModel):
    """The name of a function in `tools`."""

    name: str


class ChosenTool(StrictModel):
    """The function that the answer has to call."""

    type: Literal["function"]
    function: FunctionName


class PlainText(StrictModel):
    """Unconstrained text."""

    type: Literal["text"]


class JsonObject(StrictModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(StrictModel):
    """A named JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="accepted; the schema is always enforced")


class JsonSchemaFormat(StrictModel):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, description="default: the server's --max-output-tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("inconsistent", "top_logprobs: has no effect without logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "inconsistent", "max_tokens: is the older name of max_completion_tokens; give one of them"
            )
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(self, name) is not None and not self.tools:
                raise PydanticCustomError("inconsistent", f"{name}: has no effect without tools")
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, ChosenTool) else None
        if chosen is not None and chosen not in {tool.function.name for tool in self.tools or ()}:
            raise PydanticCustomError("inconsistent", "tool_choice: names no function of tools")
        if self.required_functions and not isinstance(self.response_format, PlainText | None):
            raise PydanticCustomError("inconsistent", "response_format: has no effect when tool_choice requires a call")
        return self

    @property
    def required_functions(self) -> list[Function]:
        """The functions of which the answer must call one; empty if no call is required."""
        match self.tool_choice:
            case "required":
                return [tool.function for tool in self.tools or ()]
            case ChosenTool(function=chosen):
                return [tool.function for tool in self.tools or () if tool.function.name == chosen.name]
        return []

    @property
    def max_output_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """Number of top log probabilities per token; `None`: no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: (
        str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    ) = Field(description="text or token ids, or a list of either")
    max_tokens: int | None = Field(None, ge=1, description="default 16")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = Field(None, description="true is not supported")
    best_of: Literal[1] | None = Field(None, description="not supported; must be 1")
    suffix: None = Field(None, description="not supported")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts: either texts or lists of token ids."""
        given: Any = self.prompt
        is_single = isinstance(given, str) or isinstance(given[0], int)
        prompts: list[str] | list[list[int]] = [given] if is_single else given
        return prompts


class Usage(BaseModel):
    """Token counts; a prompt counts once, all its answers count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A candidate token; its `bytes` need not be complete characters."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A generated token."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities of a chat choice or chunk."""

    content: list[ChatLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion choice: lists of equal length; `text_offset` counts characters."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class FunctionCall(BaseModel):
    """A called function; `arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A tool call of the answer; only chunks have an `index`."""

    index: int = 0
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(BaseModel):
    """An answer, or its next part in a chunk."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[MessageToolCall] = []


class ChatChoice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The response of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    """The next part of one of `n` answers."""

    index: int
    delta: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """An event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    """One of `n` continuations of a prompt, or its next part in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The response of `/v1/completions`, or an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """The served model; `max_model_len` is the longest prompt plus answer, in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """The response of `/v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    """`ok`, or the reason why not."""

    status: str
