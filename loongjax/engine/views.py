"""The policy's views of all open requests, kept so that a snapshot costs what changed.

Owns two lists by arrival, of those that wait and of those that run, and the names of those
whose view may have changed since. Whoever changes a request adds it to `stale`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

from loongjax.plan import RequestId, RequestView


class Views:
    """Views by arrival.

    Attributes:
      stale: Requests whose view has to be made anew.
    """

    def __init__(self) -> None:
        self.stale: set[RequestId] = set()
        self._waiting = _Line()
        self._running = _Line()
        self._places: dict[RequestId, int] = {}
        self._count = count()

    @property
    def waiting(self) -> tuple[RequestView, ...]:
        """Those without KV, or with more than one token to compute, as of `refresh`."""
        return self._waiting.views(self._places)

    @property
    def running(self) -> tuple[RequestView, ...]:
        """Those that decode, as of `refresh`."""
        return self._running.views(self._places)

    def add(self, request: RequestId) -> None:
        """A request came, after all others."""
        self._places[request] = next(self._count)
        self.stale.add(request)

    def remove(self, request: RequestId) -> None:
        """A request ended; its name may be used again."""
        del self._places[request]
        self.stale.discard(request)
        self._waiting.remove(request)
        self._running.remove(request)

    def refresh(self, make: Callable[[RequestId], RequestView]) -> None:
        """Makes stale views anew. O(stale), and a sort when a request changed lists."""
        for name in self.stale:
            view = make(name)
            waits = view.prompt + view.generated - view.computed > 1 or not view.kv
            here, there = self._running, self._waiting
            if waits:
                here, there = there, here
            if not here.replace(view):
                there.remove(name)
                here.put(view, self._places)
        self.stale.clear()


class _Line:
    """Views by place."""

    def __init__(self) -> None:
        self._views: dict[RequestId, RequestView] = {}
        self._sorted = True
        self._made: tuple[RequestView, ...] | None = ()

    def replace(self, view: RequestView) -> bool:
        """Replaces the view of a request, if it is here; says whether it was."""
        if view.id not in self._views:
            return False
        self._views[view.id] = view
        self._made = None
        return True

    def put(self, view: RequestView, places: Mapping[RequestId, int]) -> None:
        """Adds a view of a request that is not here."""
        if self._sorted and self._views:
            self._sorted = places[next(reversed(self._views))] < places[view.id]
        self._views[view.id] = view
        self._made = None

    def remove(self, request: RequestId) -> None:
        """Forgets a request, if it is here."""
        if self._views.pop(request, None) is not None:
            self._made = None

    def views(self, places: Mapping[RequestId, int]) -> tuple[RequestView, ...]:
        """All, by place."""
        if self._made is None:
            if not self._sorted:
                by_place = sorted(self._views, key=lambda name: places[name])
                self._views = {name: self._views[name] for name in by_place}
                self._sorted = True
            self._made = tuple(self._views.values())
        return self._made
