"""What a request may say. Each parameter is honoured; what is not listed here is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

# Parameters of OpenAI's that are not supported here are taken at the value that changes nothing: many clients send it.
Nothing = Annotated[float | None, Field(ge=0, le=0, description="not supported: 0 alone")]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenIds = Annotated[list[int], Field(min_length=1)]
_INT64 = 2**63


class Strict(BaseModel):
    """No unknown fields, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool = Field(default=False, description="end with a chunk that counts tokens")


class Generation(Strict):
    """What both endpoints take."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2, description="default 1; 0 takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1, description="default 1")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="the same request gets the same answer")
    n: int | None = Field(None, ge=1, le=128, description="answers to each prompt; default 1")
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="written into the log")
    frequency_penalty: Nothing = None
    presence_penalty: Nothing = None
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


class TextPart(Strict):
    """Text is the only kind of content."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A call as the model made it: `arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """A turn of the conversation. An answer may be sent back as it came."""

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


class Function(Strict):
    """What the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = Field(None, description="true is not supported")


class Tool(Strict):
    """Functions are the only kind of tool."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """One of the functions in `tools`."""

    name: str


class ChosenTool(Strict):
    """The function that the answer has to call."""

    type: Literal["function"]
    function: FunctionName


class PlainText(Strict):
    """No constraint."""

    type: Literal["text"]


class JsonObject(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A JSON schema by name."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="the schema is always kept to")


class JsonSchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(Generation):
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
                "inconsistent", "max_tokens: is max_completion_tokens by its older name; give one"
            )
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(self, name) is not None and not self.tools:
                raise PydanticCustomError("inconsistent", f"{name}: has no effect without tools")
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, ChosenTool) else None
        if chosen is not None and chosen not in {tool.function.name for tool in self.tools or ()}:
            raise PydanticCustomError("inconsistent", "tool_choice: names none of tools")
        if self.must_call and not isinstance(self.response_format, PlainText | None):
            raise PydanticCustomError(
                "inconsistent", "response_format: can't be kept to by an answer that has to be a call"
            )
        return self

    @property
    def must_call(self) -> list[Function]:
        """The functions of which the answer has to call one; none if it need not."""
        match self.tool_choice:
            case "required":
                return [tool.function for tool in self.tools or ()]
            case ChosenTool(function=chosen):
                return [tool.function for tool in self.tools or () if tool.function.name == chosen.name]
        return []

    @property
    def tokens_asked(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many log probabilities beside that of each token; `None`: not even that."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    ) = Field(description="text or token ids, or a list of either")
    max_tokens: int | None = Field(None, ge=1, description="default 16")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = Field(None, description="true is not supported")
    best_of: Literal[1] | None = Field(None, description="not supported: 1 alone")
    suffix: None = Field(None, description="not supported")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt, as a list of one kind."""
        given: Any = self.prompt
        alone = isinstance(given, str) or isinstance(given[0], int)
        prompts: list[str] | list[list[int]] = [given] if alone else given
        return prompts


FinishReason = Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    """Tokens; those of a prompt count once, those of its answers all."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that might have come; `bytes` are its own, which need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of a chat's choice, or of a chunk of it."""

    content: list[ChatLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """Of a completion's choice: lists of one length; `text_offset` counts characters."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class FunctionCall(BaseModel):
    """`arguments` is JSON, as the model wrote it."""

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A function that the model wants called; `index` stands in chunks alone."""

    index: int = 0
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(BaseModel):
    """An answer; in a chunk, the next part of it."""

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
    """An event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    """One of `n` continuations of one of the prompts, or its next part."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The response of `/v1/completions`, and an event of it where it is streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A model that is served; `max_model_len` is the longest prompt and answer together, in tokens."""

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
    """`ok`, or why not."""

    status: str
