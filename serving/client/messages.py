"""What a client sends and gets, and how that stands in messages of `loongjax.v1.Inference`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias, cast

from loongjax.errors import RequestError
from loongjax.plan import TokenLogprobs
from loongjax.sampling.params import SamplingParams
from serving.stubs import inference_pb2 as pb

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text; token ids; or a chat: mappings with `role` and `content`, oldest first."""

_MOST_ID = 2**32
_SAMPLING = tuple(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A piece of an answer.

    Attributes:
      index: Which of the `n` answers it belongs to.
      text: What is new and final of its text.
      token_ids: The new tokens.
      finish_reason: `stop`, `length` or `abort`, in the last piece of an answer alone.
      stop_token, stop_text: What stopped it, or None.
      prompt_tokens: Tokens of the prompt, in the last piece of an answer alone.
      logprobs: Log-probabilities at each new token, if they were asked for; else empty.
      prompt_logprobs: Those of the prompt from its second token on, in the first piece of an
        answer, if they were asked for; else empty.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_token: int | None = None
    stop_text: str | None = None
    prompt_tokens: int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer; see `Piece`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_token: int | None
    stop_text: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


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

    _pieces: dict[int, list[Piece]] = field(default_factory=dict)

    def add(self, piece: Piece) -> None:
        """Takes the next piece."""
        self._pieces.setdefault(piece.index, []).append(piece)

    def build(self) -> Answer:
        """The answer; every one of its completions has ended."""
        listed = [pieces for _, pieces in sorted(self._pieces.items())]
        return Answer(
            prompt_tokens=listed[0][-1].prompt_tokens or 0,
            completions=tuple(map(_completion, listed)),
        )


def _completion(pieces: Sequence[Piece]) -> Completion:
    last = pieces[-1]
    return Completion(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        finish_reason=last.finish_reason or "",
        stop_token=last.stop_token,
        stop_text=last.stop_text,
        logprobs=tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
        prompt_logprobs=tuple(chain.from_iterable(piece.prompt_logprobs for piece in pieces)),
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
        given = {name: getattr(params, name) for name in _SAMPLING}
        given["logit_bias"] = dict(params.biases)
        request.sampling.CopyFrom(pb.SamplingParams(**given))  # None leaves a field unset
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
        stop_text=finish.stop_text if finish.HasField("stop_text") else None,
        prompt_tokens=finish.prompt_tokens if is_last else None,
        logprobs=_logprobs(response.logprobs),
        prompt_logprobs=_logprobs(response.prompt_logprobs),
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
        stop_text=finish.stop_text if finish.HasField("stop_text") else None,
        logprobs=_logprobs(response.logprobs),
        prompt_logprobs=_logprobs(response.prompt_logprobs),
    )
    return BatchAnswer(request=response.request, completion=completion, error=None)


def _logprobs(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            each.token_id,
            each.logprob,
            each.rank,
            tuple((top.token_id, top.logprob) for top in each.top),
        )
        for each in messages
    )


def _reason(finish: pb.Finish) -> str:
    return pb.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
