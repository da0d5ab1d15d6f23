"""The kept views are those that one would make of all requests, after any changes."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from loongjax.engine.views import Views
from loongjax.plan import RequestView, Share


@dataclass
class Asked:
    """A request that says what its view is, and counts how often it is asked."""

    name: str
    computed: int = 0
    asked: int = 0

    def view(self) -> RequestView:
        self.asked += 1
        kv = (Share(0, self.computed),) if self.computed else ()
        return RequestView(
            id=self.name, prompt=4, max_tokens=9, arrival=0.0, computed=self.computed, kv=kv
        )


def waits(view: RequestView) -> bool:
    return view.uncomputed > 1 or not view.kv


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["come", "go", 0, 2, 3, 4]))))
def test_views_are_those_of_all_requests_by_arrival(changes):
    views, requests = Views(), {}
    for number, change in changes:
        name = f"r{number}"
        if change == "come" and name not in requests:
            requests[name] = Asked(name)
            views.add(name)
        elif change == "go" and name in requests:
            del requests[name]
            views.remove(name)
        elif name in requests and isinstance(change, int):
            requests[name].computed = change
            views.stale.add(name)
        views.refresh(lambda name: requests[name].view())
        everybody = [one.view() for one in requests.values()]
        assert views.waiting == tuple(view for view in everybody if waits(view))
        assert views.running == tuple(view for view in everybody if not waits(view))


def test_only_what_changed_is_asked():
    views, requests = Views(), {name: Asked(name) for name in "abc"}
    for name in requests:
        views.add(name)
    views.refresh(lambda name: requests[name].view())
    requests["b"].computed = 3
    views.stale.add("b")
    views.refresh(lambda name: requests[name].view())
    assert [one.asked for one in requests.values()] == [1, 2, 1]
    assert [view.id for view in views.waiting] == ["a", "c"]
