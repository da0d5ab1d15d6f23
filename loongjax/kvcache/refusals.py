"""What a step may not ask of the books of the KV pool, and how it is refused.

Pure functions; `loongjax.kvcache.BlockAllocator` calls them before it changes anything. They
know a step and a few numbers, and nothing of slots.
"""

from __future__ import annotations

from collections.abc import Sequence

from loongjax.errors import PlanError
from loongjax.kvcache.blocks import Blocks
from loongjax.plan import Chunk, InstanceId, Placement, RequestId, Step


def refusal(step: Step, text: str) -> PlanError:
    """The error of a step that is refused; `text` goes on after its name, without a full stop."""
    return PlanError(f"step {step.seq} ({type(step).__name__}) {text}.")


def check_instance(step: Step, request: RequestId, instance: InstanceId, instances: int) -> None:
    """`instance` is one of those that there are. Raises PlanError."""
    if not 0 <= instance < instances:
        raise refusal(
            step,
            f"puts KV of request {request!r} on instance {instance}, but instances are 0 "
            f"to {instances - 1}. Choose one of those",
        )


def check_free(step: Step, wanted: Sequence[int], pools: Sequence[Blocks], block_size: int) -> None:
    """Each instance has as many free blocks as the step wants there. Raises PlanError."""
    for instance, (blocks, pool) in enumerate(zip(wanted, pools, strict=True)):
        if blocks > pool.free:
            raise refusal(
                step,
                f"wants {blocks * block_size} slots in new blocks on instance {instance}, where "
                f"{pool.free * block_size} of {pool.count * block_size} are free. Keep fewer "
                f"tokens there, or preempt a request with KV on it first",
            )


def check_chunk(
    step: Step, chunk: Chunk, placement: Placement, *, computed: int, instances: int
) -> None:
    """A chunk follows the KV that there is (`computed` tokens), and its placement holds all of
    it once. Raises PlanError.
    """
    name, shares = chunk.request, placement.shares
    if placement.request != name:
        raise refusal(
            step,
            f"has the placement of request {placement.request!r} beside the chunk of "
            f"{name!r}. Put both in one order",
        )
    if chunk.start != computed:
        raise refusal(
            step,
            f"starts a chunk of request {name!r} at token {chunk.start}, but its KV has "
            f"{computed} tokens. Start it there",
        )
    if len(shares) == 1 and 0 <= shares[0][0] < instances and shares[0][1] == chunk.length > 0:
        return  # nearly always
    for instance, _ in shares:
        check_instance(step, name, instance, instances)
    kept = sum(share.tokens for share in shares)
    homes = len({share.instance for share in shares})
    smallest = min((share.tokens for share in shares), default=0)
    if kept != chunk.length or homes != len(shares) or smallest < 0:
        raise refusal(
            step,
            f"keeps {kept} of the {chunk.length} tokens of a chunk of request {name!r}, in "
            f"shares {[tuple(share) for share in shares]}. Keep every token once, with one "
            f"share for each instance",
        )
