"""The sizes of an engine's programs, in the words of the cost model."""

from __future__ import annotations

from loongjax.costmodel.padding import Padding
from loongjax.programs.catalogue import Catalogue
from pallas_kernels.striped_attention import tile_size


def padding_of(catalogue: Catalogue) -> Padding:
    """To what steps are rounded up by these programs."""
    return Padding(
        chunks=catalogue.chunk_buckets,
        resumed=catalogue.extend_buckets,
        tile=tile_size(catalogue.extend_buckets[0]),
        rows=catalogue.row_buckets,
    )
