"""Who goes to the engine next: limits, and turns that are fair between clients.

The engine gets as many requests at once as it may have; the others wait here. Turns go by what
clients have used so far: next is the client that used least, prompt and answer tokens together
(virtual token counters: Sheng et al., "Fairness in Serving Large Language Models", OSDI '24). Who
was away is lifted to the least of those who wait, so that nobody saves up. Of one client's
requests, the highest priority goes first, then the oldest.

Belongs to one asyncio loop. Every operation costs O(clients) at most.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from serving.config import Limits
from serving.errors import BusyError

_RETRY_AFTER_S = 1


class WithdrawnError(Exception):
    """A ticket was withdrawn before its turn came."""


@dataclass(kw_only=True, slots=True)
class Ticket:
    """A request that wants to go, or has gone, to the engine.

    Attributes:
      client: Whose it is.
      prompt_tokens: Length of its prompt.
      answer_tokens: What the engine gave for it; counts as used when its turn is over.
      turn: Done when its turn has come; None unless it waits.
    """

    client: str
    prompt_tokens: int
    answer_tokens: int = 0
    turn: asyncio.Future[None] | None = None

    def withdraw(self) -> None:
        """Ends the wait with `WithdrawnError`; nothing happens when its turn has come."""
        if self.turn is not None and not self.turn.done():
            self.turn.set_exception(WithdrawnError())


class _Waiting(NamedTuple):
    order: tuple[int, int]
    ticket: Ticket
    turn: asyncio.Future[None]


@dataclass(kw_only=True)
class Gate:
    """See the module.

    Attributes:
      limits: What there may be at once.
      waiting: Requests that wait for their turn.
      waiting_tokens: Tokens of their prompts.
    """

    limits: Limits
    waiting: int = 0
    waiting_tokens: int = 0
    _lines: dict[str, list[_Waiting]] = field(default_factory=dict)
    _used: dict[str, int] = field(default_factory=dict)
    _of_client: Counter[str] = field(default_factory=Counter)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _active: int = 0

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """A place for one request while the block runs, be it waiting or with the engine.

        Raises:
          BusyError: There is none.
        """
        limits = self.limits
        mine = self._of_client[client]
        if limits.max_client_requests is not None and mine >= limits.max_client_requests:
            raise _busy(
                f"{mine} requests of {client} are open, and max_client_requests is "
                f"{limits.max_client_requests}"
            )
        if self._of_client.total() >= limits.max_requests + limits.max_queue:
            raise _busy(
                f"{self._of_client.total()} requests are open, and max_requests is "
                f"{limits.max_requests}, max_queue {limits.max_queue}"
            )
        self._of_client[client] += 1
        try:
            yield
        finally:
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]
                self._forget()

    @asynccontextmanager
    async def turn(self, ticket: Ticket, priority: int = 0) -> AsyncIterator[None]:
        """Waits for the ticket's turn, and keeps its place in the engine while the block runs.

        Raises:
          BusyError: Too many prompt tokens wait.
          WithdrawnError: The ticket was withdrawn.
        """
        self._greet(ticket.client)
        if self._active < self.limits.max_requests:
            self._enter(ticket)
        else:
            await self._wait(ticket, priority)
        try:
            yield
        finally:
            self._active -= 1
            self._charge(ticket.client, ticket.answer_tokens)
            self._let_in()

    async def _wait(self, ticket: Ticket, priority: int) -> None:
        limit = self.limits.max_waiting_tokens
        if limit is not None and self.waiting_tokens + ticket.prompt_tokens > limit:
            raise _busy(
                f"{self.waiting_tokens} prompt tokens wait, the prompt has "
                f"{ticket.prompt_tokens}, and max_waiting_tokens is {limit}"
            )
        turn = ticket.turn = asyncio.get_running_loop().create_future()
        waiting = _Waiting((-priority, next(self._numbers)), ticket, turn)
        heapq.heappush(self._lines.setdefault(ticket.client, []), waiting)
        self.waiting += 1
        self.waiting_tokens += ticket.prompt_tokens
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._active -= 1  # its turn came, and nobody takes it
            else:
                self._leave(waiting)
            self._let_in()
            raise

    def _let_in(self) -> None:
        while self._lines and self._active < self.limits.max_requests:
            ready = [name for name, line in self._lines.items() if not line[0].turn.done()]
            if not ready:
                return
            client = min(ready, key=lambda name: (self._used[name], self._lines[name][0].order))
            waiting = self._lines[client][0]
            self._leave(waiting)
            self._enter(waiting.ticket)
            waiting.turn.set_result(None)

    def _leave(self, waiting: _Waiting) -> None:
        line = self._lines[waiting.ticket.client]
        line.remove(waiting)
        heapq.heapify(line)
        if not line:
            del self._lines[waiting.ticket.client]
        self.waiting -= 1
        self.waiting_tokens -= waiting.ticket.prompt_tokens

    def _enter(self, ticket: Ticket) -> None:
        self._active += 1
        self._charge(ticket.client, ticket.prompt_tokens)

    def _charge(self, client: str, tokens: int) -> None:
        self._used[client] = self._used.get(client, 0) + tokens

    def _forget(self) -> None:
        """Drops clients without requests, as soon as that makes no difference to `_greet`."""
        least = min((self._used[name] for name in self._lines), default=math.inf)
        self._used = {
            name: used
            for name, used in self._used.items()
            if name in self._of_client or used > least
        }

    def _greet(self, client: str) -> None:
        """A client without a request in line begins where the least of the others stands."""
        if client not in self._lines and self._lines:
            least = min(self._used[name] for name in self._lines)
            self._used[client] = max(self._used.get(client, 0), least)
        self._used.setdefault(client, 0)


def _busy(what: str) -> BusyError:
    return BusyError(f"{what}; try again in {_RETRY_AFTER_S} s", retry_after_s=_RETRY_AFTER_S)
