"""Limits, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.config import Limits
from serving.errors import BusyError
from serving.gate import Gate, Ticket, WithdrawnError


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Crowd:
    """Requests at a gate with one place, in the order in which they got their turns."""

    def __init__(self, **limits: int) -> None:
        self.gate = Gate(limits=Limits(**({"max_requests": 1} | limits)))
        self.turns: list[str] = []
        self.tickets: dict[str, Ticket] = {}

    def come(self, name: str, client: str = "a", *, tokens: int = 10, priority: int = 0):
        ticket = self.tickets[name] = Ticket(client=client, prompt_tokens=tokens)

        async def run() -> None:
            with self.gate.place(client):
                async with self.gate.turn(ticket, priority):
                    self.turns.append(name)
                    await settle()

        return asyncio.create_task(run())


def test_turns_go_to_who_used_least():
    """A client that sends many requests does not hold up one that sends few."""

    async def main() -> list[str]:
        crowd = Crowd()
        tasks = [crowd.come(f"many{i}", "many") for i in range(6)]
        await settle()
        tasks += [crowd.come(f"few{i}", "few") for i in range(2)]
        await asyncio.gather(*tasks)
        return crowd.turns

    turns = asyncio.run(main())
    assert turns.index("few1") <= 5
    assert turns[-1].startswith("many")


def test_long_prompts_use_more():
    async def main() -> Counter[str]:
        crowd = Crowd()
        tasks = [crowd.come("first", "x")]
        await settle()
        tasks += [crowd.come(f"long{i}", "long", tokens=90) for i in range(10)]
        tasks += [crowd.come(f"short{i}", "short", tokens=10) for i in range(10)]
        await asyncio.gather(*tasks)
        return Counter(name.rstrip("0123456789") for name in crowd.turns[1:11])

    assert asyncio.run(main())["short"] >= 8


def test_a_clients_own_line_goes_by_priority():
    async def main() -> list[str]:
        crowd = Crowd()
        tasks = [crowd.come("first")]
        await asyncio.sleep(0)
        tasks += [crowd.come("low"), crowd.come("high", priority=1), crowd.come("low2")]
        await asyncio.gather(*tasks)
        return crowd.turns

    assert asyncio.run(main()) == ["first", "high", "low", "low2"]


@pytest.mark.parametrize(
    ("limits", "open_before", "tokens", "message"),
    [
        ({"max_queue": 1}, 2, 10, "max_requests is 1, max_queue 1; try again in 1 s"),
        ({"max_client_requests": 2}, 2, 10, "2 requests of a are open, and max_client_requests"),
        ({"max_waiting_tokens": 25}, 2, 16, "10 prompt tokens wait, the prompt has 16, and"),
    ],
)
def test_limits(limits, open_before, tokens, message):
    async def main() -> None:
        crowd = Crowd(**limits)
        tasks = [crowd.come(f"{i}") for i in range(open_before)]
        for _ in range(3):
            await asyncio.sleep(0)
        late = crowd.come("late", tokens=tokens)
        with pytest.raises(BusyError, match=message):
            await late
        await asyncio.gather(*tasks)
        await crowd.come("later", tokens=tokens)

    asyncio.run(main())


def test_a_ticket_can_be_withdrawn():
    async def main() -> None:
        crowd = Crowd()
        first = crowd.come("first")
        for _ in range(3):
            await asyncio.sleep(0)
        second, third = crowd.come("second"), crowd.come("third")
        for _ in range(3):
            await asyncio.sleep(0)
        crowd.tickets["second"].withdraw()
        with pytest.raises(WithdrawnError):
            await second
        await asyncio.gather(first, third)
        assert crowd.turns == ["first", "third"]
        crowd.tickets["third"].withdraw()  # too late, and nothing happens

    asyncio.run(main())


FATES = ("stay", "stay", "cancel", "withdraw", "wait")


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.sampled_from(FATES)), max_size=20
    )
)
def test_whoever_leaves_leaves_no_trace(comers):
    """Whatever is cancelled or withdrawn, everyone else gets a turn, and all counts end at 0."""

    async def main() -> None:
        crowd = Crowd(max_requests=2)
        tasks = [
            crowd.come(f"{i}", client, tokens=tokens)
            for i, (client, tokens, _) in enumerate(comers)
        ]
        gone = set()
        for i, (_, _, fate) in enumerate(comers):
            match fate:
                case "cancel":
                    tasks[i].cancel()
                    gone.add(str(i))
                case "withdraw":
                    crowd.tickets[str(i)].withdraw()
                    gone.add(str(i))
                case "wait":
                    await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert {str(i) for i in range(len(tasks))} - gone <= set(crowd.turns)
        gate = crowd.gate
        assert (gate.waiting, gate.waiting_tokens, gate._active) == (0, 0, 0)
        assert (gate._lines, gate._of_client, gate._used) == ({}, {}, {})

    asyncio.run(main())


def test_clients_that_went_are_forgotten_while_others_wait():
    async def main() -> None:
        crowd = Crowd()
        async with AsyncExitStack() as stack:
            stack.enter_context(crowd.gate.place("a"))
            await stack.enter_async_context(crowd.gate.turn(Ticket(client="a", prompt_tokens=1)))
            waiting = crowd.come("waiting", "b")
            for i in range(20):
                passing = crowd.come("passing", f"client {i}")
                await settle()
                passing.cancel()
                await asyncio.wait([passing])
            assert crowd.gate.waiting == 1
            assert set(crowd.gate._used) == {"a", "b"}
        await waiting

    asyncio.run(main())


def test_who_used_much_is_not_forgotten_by_going_away():
    async def main() -> list[str]:
        crowd = Crowd()
        tasks = [crowd.come("hungry", "much", tokens=1000)]
        await asyncio.sleep(0)
        tasks += [crowd.come(f"few{i}", "few", tokens=1) for i in range(6)]
        await tasks[0]  # nothing of this client is open now
        tasks += [crowd.come("hungry again", "much", tokens=1)]
        await asyncio.gather(*tasks)
        return crowd.turns

    assert asyncio.run(main())[-1] == "hungry again"


def test_nobody_is_held_up_while_there_is_room():
    async def main() -> None:
        gate = Gate(limits=Limits(max_requests=3, max_queue=0))
        async with AsyncExitStack() as stack:
            for _ in range(3):
                stack.enter_context(gate.place("a"))
                await stack.enter_async_context(gate.turn(Ticket(client="a", prompt_tokens=1)))
            with pytest.raises(BusyError, match="3 requests are open"):
                stack.enter_context(gate.place("b"))

    asyncio.run(main())
