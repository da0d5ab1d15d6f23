"""Steps cost what the program that runs them does."""

from __future__ import annotations

import pytest

from loongjax.costmodel.padding import Padding
from loongjax.costmodel.protocol import ChunkWork, DecodeWork
from loongjax.errors import ConfigError

SIZES = Padding(chunks=(128, 512), resumed=(512,), tile=64, rows=(1, 8, 32))


@pytest.mark.parametrize(
    ("degree", "chunks", "computed"),
    [
        (1, [(1, 0)], 128),
        (1, [(100, 0), (29, 0)], 512),
        (2, [(129, 0), (127, 0)], 1024),  # each is padded to a multiple of 2 first: 65 + 64
        (4, [(512, 0)], 512),
        (2, [(10, 5)], 1024),  # history: the largest there is
        (1, [(600, 0)], 600),  # beyond all sizes, as it is
    ],
)
def test_tokens_of_a_prefill(degree, chunks, computed):
    assert SIZES.tokens(degree, [ChunkWork(*chunk) for chunk in chunks]) == computed


def test_every_rank_computes_as_many_rows_as_the_busiest_master():
    padded = SIZES.work(4, DecodeWork(9, 900, 1))
    assert padded == DecodeWork(128, 900, 4, 100)
    assert SIZES.work(4, padded) == padded
    assert SIZES.work(2, DecodeWork(2, 900, 2, 880)) == DecodeWork(2, 900, 2, 880)


@pytest.mark.parametrize("rows", [(), (8, 1), (0, 8), (8, 8)])
def test_sizes_ascend(rows):
    with pytest.raises(ConfigError, match="sizes of rows must ascend from at least 1"):
        Padding(chunks=(128,), resumed=(128,), tile=64, rows=rows)


def test_chunks_with_history_are_rounded_up_to_tiles():
    chunks = [ChunkWork(1, 0), ChunkWork(1, 900), ChunkWork(200, 900)]
    assert SIZES.tiled(1, chunks) == [(1, 0), (64, 900), (256, 900)]
    assert SIZES.tiled(2, chunks) == [(1, 0), (128, 900), (256, 900)]


def test_a_tile_has_a_query():
    with pytest.raises(ConfigError, match="a tile must have at least 1 query, not 0"):
        Padding(chunks=(128,), resumed=(128,), tile=0, rows=(1,))
