"""Steps are handed out once, to everyone who follows."""

from __future__ import annotations

import asyncio

from serving import steps
from serving.steps import StepFeed
from tests.engine.rig import collect, rig


def test_followers_and_listeners_get_each_step_once():
    async def main() -> None:
        with rig() as parts:
            heard = []
            feed = StepFeed(parts.engine, [heard.extend])
            collect(parts.submit("before"))
            with feed.follow() as following:
                collect(parts.submit("after"))
                while feed._seen < len(parts.engine.steps()):
                    feed.look()
                records = [await anext(following) for _ in range(4)]
            assert all(record.requests == ("after",) for record in records)
            assert len(feed.listeners) == 1
            assert tuple(heard) == parts.engine.steps()

    asyncio.run(main())


def test_a_slow_follower_loses_the_oldest(monkeypatch):
    monkeypatch.setattr(steps, "_MOST_KEPT", 3)

    async def main() -> None:
        with rig() as parts:
            feed = StepFeed(parts.engine)
            with feed.follow() as following:
                collect(parts.submit("a", max_tokens=9))
                while feed._seen < len(parts.engine.steps()):
                    feed.look()
                assert (await anext(following)).seq == parts.engine.steps()[-3].seq

    asyncio.run(main())
