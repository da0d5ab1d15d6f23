"""The KV pool: who holds which slots (host), and the arrays themselves (device).

This package exports the host half and never imports jax. The device half is
`loongjax.kvcache.pool`, to be imported by name.
"""

from loongjax.kvcache.allocator import BlockAllocator
from loongjax.kvcache.holding import Whereabouts
from loongjax.kvcache.messages import (
    DecodeSlots,
    MigrateSlots,
    MoveSlots,
    PrefillSlots,
    ShareSlots,
    SlotPlan,
)
from loongjax.kvcache.tables import BlockTable, TableUpdates

__all__ = [
    "BlockAllocator",
    "BlockTable",
    "DecodeSlots",
    "MigrateSlots",
    "MoveSlots",
    "PrefillSlots",
    "ShareSlots",
    "SlotPlan",
    "TableUpdates",
    "Whereabouts",
]
