"""The one place that rounds sizes up to what is compiled.

Sizes are powers of two and, beyond twice the smallest, the steps half-way between them: at
most a third of such a bucket is padding, with two programs for each doubling.
"""

from __future__ import annotations

MIN_CHUNK_TOKENS = 64
MIGRATE_TOKENS = 1024  # that a rank sends to each other in one launch; longer moves take several
MIN_ROWS = 4  # on CPU, matrix products of 1 to 3 rows are not faster than of 4


def bucket(size: int, smallest: int) -> int:
    """The smallest bucket that holds `size`; `smallest` is a power of two."""
    power = smallest
    while power < size:
        if power * 3 // 2 >= size and power > smallest:
            return power * 3 // 2
        power *= 2
    return power


def chunk_bucket(tokens_per_rank: int) -> int:
    """Local tokens of a prefill program that holds `tokens_per_rank`."""
    return bucket(tokens_per_rank, MIN_CHUNK_TOKENS)


def row_bucket(rows_per_rank: int) -> int:
    """Rows per rank of a decode program; powers of two only, rows are cheap to pad."""
    size = MIN_ROWS
    while size < rows_per_rank:
        size *= 2
    return size
