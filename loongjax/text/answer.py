"""The text of an answer: tokens in, text out, up to what ends it.

The engine and whoever shows the text each have one for the same answer: both see the same tokens
and so find the same end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loongjax.sampling.params import SamplingParams
from loongjax.text.detokenizer import IncrementalDetokenizer
from loongjax.text.stops import StopFinder
from loongjax.text.tokenizer import Tokenizer


class AnswerText:
    """The text of one answer, as it becomes final; without a tokenizer always empty."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        """`params` say which texts end it, and whether that is a part of it."""
        self._text = None if tokenizer is None else IncrementalDetokenizer(tokenizer)
        self._finder = StopFinder(params.stop, keeps=params.include_stop_str_in_output)
        self._has_stops = bool(params.stop)
        self._keeps = params.include_stop_str_in_output
        self._unstoppable = params.min_tokens - 1
        self._tokens = 0

    @property
    def stop(self) -> str | None:
        """The text that ended it, or None."""
        return self._finder.found

    def push(self, token_ids: Sequence[int], *, stopped: bool = False) -> str:
        """Takes the next tokens; returns the text that is final now, often empty.

        `stopped`: the last of them ended the answer.
        """
        if self._text is None:
            return ""
        ids = token_ids[:-1] if stopped and not self._keeps else token_ids
        if not self._has_stops:
            return self._text.push(ids)
        return "".join(self._search(self._text, ids))

    def flush(self) -> str:
        """Ends the text: returns what was held back, if it was not the end."""
        if self._text is None or self.stop is not None:
            return ""
        rest = self._finder.push(self._text.flush(), may_stop=False)
        return rest + self._finder.flush()

    def _search(self, text: IncrementalDetokenizer, ids: Sequence[int]) -> Iterable[str]:
        for token in ids:  # each by itself: a stop text is found at the token that completes it
            yield self._finder.push(text.push((token,)), may_stop=self._tokens >= self._unstoppable)
            self._tokens += 1
