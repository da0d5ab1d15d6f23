"""One step ahead: what may be launched behind a decode step whose tokens are not known yet.

A pure function. When it may be asked is the policy's decision (`Plan.ahead`) and the loop's;
that the tokens come from the device is the executor's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from loongjax.plan import DecodeStep, RequestId
from loongjax.programs.buckets import row_bucket


def continue_step(
    step: DecodeStep,
    *,
    seq: int,
    goes_on: Callable[[RequestId], bool],
    fits: Callable[[DecodeStep], bool],
) -> DecodeStep | None:
    """The step behind `step`: the same rows, without those that end with it.

    Rows keep master and home. An end token is found one step late: such a row takes one slot
    too many, which is free again when this step ends. Length is known before, so that nobody
    takes more than `RequestView.peak` slots.

    Args:
      step: The newest step of its group, in flight and booked.
      seq: The number of the step behind it.
      goes_on: Whether a request decodes on after `step`, as far as is known.
      fits: Whether the homes of a step have room for its tokens.

    Returns:
      None where the group is better left to the policy: nobody goes on, a home has no room, or
      the rows, spread evenly, would fit a smaller program (the step behind reads the tokens of
      the one before from an array of its shape, so it must be of the same).
    """
    rows = step.rows
    going = [row for row in rows if goes_on(row[0])]
    if len(going) < len(rows):
        rows = tuple(going)
        if not rows or row_bucket(-(-len(rows) // len(step.group))) != _bucket(step):
            return None
    following = DecodeStep(seq=seq, group=step.group, rows=rows)
    return following if fits(following) else None


def _bucket(step: DecodeStep) -> int:
    return row_bucket(max(Counter(row.master for row in step.rows).values()))
