"""What a request lived through, drawn for a terminal: who worked, and where its KV lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from loongjax.engine import StepRecord

_CELL = 9


def draw_request(records: Sequence[StepRecord], instances: int) -> str:
    """Draws the steps of one request, oldest first, a column for each instance.

    Successive steps of one kind and group are one line. Under a prefill stands what was
    retained where, in KV tokens; in a decode, `M` marks the master of the request's row; in a
    migration stands what arrived where, in KV tokens of the whole batch.
    """
    head = "".join(f"{f'inst {i}':>{_CELL}}" for i in range(instances))
    lines = [f"{'':26}{head}"]
    for (kind, group), run in groupby(records, key=lambda record: (record.kind, record.group)):
        steps = list(run)
        seconds = sum(step.ended - step.started for step in steps)
        label = f"{kind} at degree {len(group)}"
        if kind == "prefill":
            tokens = sum(step.tokens for step in steps)
            lines.append(_line(label, ["█" * 6 if i in group else "·" for i in range(instances)]))
            lines.append(
                f"{'':26}  {tokens:,} prompt tokens striped over {len(group)}: {seconds:.1f} s"
            )
            kept = sum((Counter(dict(step.kept)) for step in steps), Counter())
            lines.append(_line("  KV retained", _counts(kept, instances)))
        elif kind == "migrate":
            kept = sum((Counter(dict(step.kept)) for step in steps), Counter())
            lines.append(_line(label, _counts(kept, instances)))
            lines.append(f"{'':26}  {kept.total():,} KV tokens moved: {seconds:.1f} s")
        else:
            masters = {master for step in steps for master in step.masters}
            cells = ["·"] * instances
            for i in group:
                cells[i] = "▒▒▒▒ M" if i in masters else "▒▒▒▒  "
            lines.append(_line(label, cells))
            rate = len(steps) / seconds if seconds else 0.0
            lines.append(f"{'':26}  {len(steps)} tokens, one a step: {rate:.1f} tokens/s")
    return "\n".join(lines)


def _counts(tokens: Counter[int], instances: int) -> list[str]:
    return [f"{tokens[i]:,}" if tokens[i] else "·" for i in range(instances)]


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:26}" + "".join(f"{cell:>{_CELL}}" for cell in cells)
