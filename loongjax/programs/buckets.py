"""The one place that rounds sizes up to what is compiled.

Every size here multiplies the programs of every degree, and a program of a large model takes
a minute to compile. So there are few: chunks double from 512 tokens on, with one size below
for short prompts; rows are one, for a request alone, and quadruple from 8 on, since a decode
step reads the weights once whatever its rows. (On two CPU cores 8 rows take 1.6 times as long
as one.)
"""

from __future__ import annotations

MIN_CHUNK_TOKENS = 128
_SEVERAL_ROWS = 8
MIGRATE_TOKENS = 1024  # that a rank sends to each other in one launch; longer moves take several
_DOUBLING_FROM = 512


def chunk_bucket(tokens_per_rank: int) -> int:
    """Local tokens of a prefill program that holds `tokens_per_rank`."""
    if tokens_per_rank <= MIN_CHUNK_TOKENS:
        return MIN_CHUNK_TOKENS
    return max(_DOUBLING_FROM, 1 << (tokens_per_rank - 1).bit_length())


def row_bucket(rows_per_rank: int) -> int:
    """Rows per rank of a decode program that holds `rows_per_rank`."""
    if rows_per_rank <= 1:
        return 1
    size = _SEVERAL_ROWS
    while size < rows_per_rank:
        size *= 4
    return size
