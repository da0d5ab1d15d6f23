"""The bodies of requests and responses, as OpenAI's API has them.

A field that is not honoured yet is there with the one value that asks for nothing, so that clients
which always send it are served, and whoever asks for more is refused with the field's name. Fields
that are not here are refused by name as well.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loongjax.errors import RequestError
from loongjax.sampling.params import SamplingParams

_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Logprobs = Annotated[int, Field(ge=0, le=20)]
_Stop = Annotated[str, Field(min_length=1)]
_WrittenId = Annotated[str, Field(pattern=r"^\d+$")]
_TokenId = Annotated[int, Field(ge=0)]
_TokenIds = Annotated[list[_TokenId], Field(min_length=1)]
_MOST_PROMPTS = 64
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "n",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "prompt_logprobs",
)
"""Fields that have the same name and meaning in `SamplingParams`."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream says beside the answer."""

    include_usage: bool | None = None


class _Generation(_Body):
    """What completions and chats have in common."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: dict[_WrittenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: _Stop | list[_Stop] | None = Field(default=None, description="what ends the answer")
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="without effect")
    # vLLM's extensions
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    include_stop_str_in_output: bool = False
    prompt_logprobs: _Logprobs | None = Field(default=None, description="with each choice")
    ignore_eos: bool = False
    stop_token_ids: list[_TokenId] | None = None
    priority: int | None = Field(default=None, description="higher is served earlier")
    return_token_ids: bool | None = Field(default=None, description="with each choice")
    # Not honoured yet
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=0)] | None = None

    def params(self, max_tokens: int | None) -> SamplingParams:
        """As the engine takes them.

        Raises:
          RequestError: A value is out of range.
        """
        given = {name: getattr(self, name) for name in _SAMPLING}
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            max_tokens=max_tokens,
            logprobs=self.wanted_logprobs(),
        )

    def wanted_logprobs(self) -> int | None:
        """Likely tokens that are to be told of at each place of an answer."""
        raise NotImplementedError


class CompletionRequest(_Generation):
    """Body of `/v1/completions`."""

    prompt: (
        str
        | _TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Annotated[list[_TokenIds], Field(min_length=1, max_length=_MOST_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(default=16)
    logprobs: _Logprobs | None = None
    # Not honoured yet
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    def wanted_logprobs(self) -> int | None:
        """See `_Generation`."""
        return self.logprobs

    def sampling(self) -> SamplingParams:
        """As `params`."""
        return self.params(self.max_tokens)


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a chat."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content} | named


class ChatRequest(_Generation):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: _Logprobs | None = None
    # Not honoured yet
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="without effect")
    store: Literal[False] | None = None

    def sampling(self) -> SamplingParams:
        """As `params`; RequestError too if the limit is given twice."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError("give max_completion_tokens or max_tokens, not both")
        return self.params(self.max_completion_tokens or self.max_tokens)

    def wanted_logprobs(self) -> int | None:
        """See `_Generation`.

        Raises:
          RequestError: `top_logprobs` without `logprobs`.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(_Body):
    """Body of `/tokenize`: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True


class TokenizeResponse(BaseModel):
    """Body of the answer."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(_Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: list[_TokenId]


class DetokenizeResponse(BaseModel):
    """Body of the answer."""

    prompt: str


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Body of every answer that is an error."""

    error: ErrorBody


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities at the tokens of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """Log-probability of a token of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionChoice(BaseModel):
    """An answer."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    """Body of an answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopLogprob(BaseModel):
    """Log-probability of a token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """Log-probabilities at one token of an answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities at the tokens of an answer."""

    content: list[ChatLogprob]


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: dict[str, str | None]
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    """Body of an answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["loongjax"] = "loongjax"
    max_model_len: int


class ModelList(BaseModel):
    """Body of the answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
