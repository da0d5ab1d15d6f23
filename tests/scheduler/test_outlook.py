"""What prompts can count on."""

from __future__ import annotations

import pytest

from loongjax.cluster.topology import EverySubset, Neighbours
from loongjax.plan import InstanceView, RequestView, Share, Snapshot, Topology
from loongjax.scheduler.policies.outlook import Outlook
from loongjax.scheduler.policies.worktable import Worktable
from tests.scheduler.analytic_cost import AnalyticCost

SLOTS = 20_000
PREFILL = 3


@pytest.mark.parametrize(
    ("topology", "moved"), [(EverySubset(5), 1_000), (Neighbours(5), None)], ids=["any", "ring"]
)
def test_kv_can_only_be_moved_where_a_group_leads(topology: Topology, moved: int | None) -> None:
    """Prompts run on 1, 3 and 4, so that on a ring no group has both 0 and 2."""
    decodes = RequestView(
        id="d",
        prompt=900,
        max_tokens=200,
        arrival=0.0,
        computed=1_000,
        generated=101,
        kv=(Share(2, 1_000),),
        last_seq=2,
    )
    head = RequestView(id="p", prompt=500, max_tokens=10, arrival=1.0)
    busy = {1: PREFILL, 3: PREFILL, 4: PREFILL}
    snapshot = Snapshot(
        version=0,
        next_seq=4,
        block_size=1,
        max_chunk_tokens=SLOTS,
        max_rows=64,
        waiting=(head,),
        running=(decodes,),
        instances=tuple(
            InstanceView(
                id=i,
                slots=SLOTS,
                free_slots=SLOTS - (1_000 if i == 2 else 0),
                busy_seq=busy.get(i),
                prefill_seq=busy.get(i),
            )
            for i in range(5)
        ),
        in_flight=frozenset(),
        topology=topology,
    )
    outlook = Outlook(Worktable(snapshot, 0), AnalyticCost(), typical_answer=100)
    found = {each.instance: each.moved for each in outlook.candidates(head, set())}
    assert found == {0: 0, 2: moved}
