"""Texts that end an answer, found while it comes piece by piece.

Promises: what is found does not depend on where the pieces are cut; what was given out is never
taken back, so the beginning of a stop text is held back until it is clear what it becomes.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Looks for the first of some texts that is complete; of several that end there, the longest.

    Attributes:
      found: The text that ended the answer, or None.
    """

    def __init__(self, stops: Sequence[str], *, keeps: bool = False) -> None:
        """`keeps`: the text that was found belongs to the answer."""
        self.found: str | None = None
        self._stops = tuple(stops)
        self._keeps = keeps
        self._held = ""

    def push(self, piece: str, *, may_stop: bool = True) -> str:
        """Takes the next piece; returns what is final now. Nothing follows what was found.

        `may_stop`: whether a stop text that ends in this piece ends the answer.
        """
        if self.found is not None:
            return ""
        text = self._held + piece
        match = self._match(text) if may_stop else None
        if match is not None:
            begin, end = match
            self.found, self._held = text[begin:end], ""
            return text[: end if self._keeps else begin]
        held = self._unclear(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Ends the answer: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str) -> tuple[int, int] | None:
        """Begin and end of the first stop text that ends behind what was held back."""
        old, found = len(self._held), []
        for stop in self._stops:
            begin = text.find(stop, max(old - len(stop) + 1, 0))
            if begin >= 0:
                found.append((begin + len(stop), begin))
        if not found:
            return None
        end, begin = min(found)
        return begin, end

    def _unclear(self, text: str) -> int:
        """The length of the longest end of a text with which a stop text begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
