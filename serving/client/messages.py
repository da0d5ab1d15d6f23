"""What a client sends and gets, and how that stands in messages of `loongjax.v1.Inference`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from loongjax.errors import RequestError
from loongjax.sampling.params import SamplingParams
from serving.stubs import inference_pb2 as pb

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text; token ids; or a chat: mappings with `role` and `content`, oldest first."""

_MOST_ID = 2**32


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A piece of an answer.

    Attributes:
      index: Which of the `n` answers it belongs to.
      text: What is new and final of its text.
      token_ids: The new tokens.
      finish_reason: `stop`, `length` or `abort`, in the last piece of an answer alone.
      stop_token: The token that stopped it, or None.
      prompt_tokens: Tokens of the prompt, in the last piece of an answer alone.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_token: int | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer; see `Piece`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_token: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answers to one prompt, by index. The first one's text and ids are its own too."""

    prompt_tokens: int
    completions: tuple[Completion, ...]

    @property
    def text(self) -> str:
        """The first answer's."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first answer's."""
        return self.completions[0].token_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchAnswer:
    """An answer to one prompt of a batch.

    Attributes:
      request: The prompt's place in the batch.
      completion: The answer; None if it failed.
      error: What went wrong, or None.
    """

    request: int
    completion: Completion | None
    error: str | None


@dataclass(kw_only=True)
class AnswerBuilder:
    """Puts the pieces of an answer together."""

    _texts: dict[int, list[str]] = field(default_factory=dict)
    _ids: dict[int, list[int]] = field(default_factory=dict)
    _last: dict[int, Piece] = field(default_factory=dict)

    def add(self, piece: Piece) -> None:
        """Takes the next piece."""
        self._texts.setdefault(piece.index, []).append(piece.text)
        self._ids.setdefault(piece.index, []).extend(piece.token_ids)
        if piece.finish_reason is not None:
            self._last[piece.index] = piece

    def build(self) -> Answer:
        """The answer; every one of its completions has ended."""
        return Answer(
            prompt_tokens=next(iter(self._last.values())).prompt_tokens or 0,
            completions=tuple(
                Completion(
                    index=index,
                    text="".join(self._texts[index]),
                    token_ids=tuple(self._ids[index]),
                    finish_reason=last.finish_reason or "",
                    stop_token=last.stop_token,
                )
                for index, last in sorted(self._last.items())
            ),
        )


def to_request(
    prompt: Prompt, params: SamplingParams | None, priority: int = 0, request_id: str = ""
) -> pb.GenerateRequest:
    """The message for a prompt.

    Raises:
      RequestError: The prompt is none of what `Prompt` says.
    """
    request = pb.GenerateRequest(request_id=request_id, prompt=to_prompt(prompt), priority=priority)
    if params is not None:
        sampling = request.sampling
        sampling.temperature = params.temperature
        sampling.n = params.n
        if params.seed is not None:
            sampling.seed = params.seed
        if params.max_tokens is not None:
            sampling.max_tokens = params.max_tokens
        sampling.stop_token_ids.extend(params.stop_token_ids)
        sampling.ignore_eos = params.ignore_eos
    return request


def to_prompt(prompt: Prompt) -> pb.Prompt:
    """The message for a prompt; raises as `to_request`."""
    if isinstance(prompt, str):
        return pb.Prompt(text=prompt)
    if len(prompt) and isinstance(prompt[0], Mapping):
        messages = cast(Sequence[Mapping[str, str]], prompt)
        try:
            chat = [pb.ChatMessage(role=each["role"], content=each["content"]) for each in messages]
        except (KeyError, TypeError) as error:
            raise RequestError(f"a message has a role and a content, both texts: {error}") from None
        return pb.Prompt(chat=pb.Chat(messages=chat))
    ids = cast(Sequence[int], prompt)
    for token in ids:
        if not 0 <= token < _MOST_ID:
            raise RequestError(f"token ids are in [0, {_MOST_ID}), not {token}")
    return pb.Prompt(token_ids=pb.TokenIds(ids=ids))


def to_batch(
    prompts: Iterable[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    priority: int,
) -> pb.GenerateBatchRequest:
    """The message for a batch; raises as `to_request`, or if there are too few `params`."""
    listed = list(prompts)
    if params is None or isinstance(params, SamplingParams):
        each: Sequence[SamplingParams | None] = [params] * len(listed)
    elif len(params) == len(listed):
        each = params
    else:
        raise RequestError(
            f"got {len(params)} sampling params for {len(listed)} prompts; give one for each, or "
            "one for all"
        )
    requests = [to_request(p, own, priority) for p, own in zip(listed, each, strict=True)]
    return pb.GenerateBatchRequest(requests=requests)


def to_piece(response: pb.GenerateResponse) -> Piece:
    """What a message says."""
    is_last = response.HasField("finish")
    finish = response.finish
    return Piece(
        index=response.index,
        text=response.text,
        token_ids=tuple(response.token_ids),
        finish_reason=_reason(finish) if is_last else None,
        stop_token=finish.stop_token_id if finish.HasField("stop_token_id") else None,
        prompt_tokens=finish.prompt_tokens if is_last else None,
    )


def to_batch_answer(response: pb.GenerateBatchResponse) -> BatchAnswer:
    """What a message says."""
    finish = response.finish
    if finish.reason == pb.FINISH_REASON_ERROR:
        return BatchAnswer(request=response.request, completion=None, error=finish.error)
    completion = Completion(
        index=response.index,
        text=response.text,
        token_ids=tuple(response.token_ids),
        finish_reason=_reason(finish),
        stop_token=finish.stop_token_id if finish.HasField("stop_token_id") else None,
    )
    return BatchAnswer(request=response.request, completion=completion, error=None)


def _reason(finish: pb.Finish) -> str:
    return pb.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
