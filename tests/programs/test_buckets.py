"""One function rounds sizes up: monotone, tight, and at rest on its own results."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.programs.buckets import (
    MIN_CHUNK_TOKENS,
    MIN_ROWS,
    bucket,
    chunk_bucket,
    row_bucket,
)

sizes = st.integers(1, 2**20)
smallests = st.integers(0, 10).map(lambda power: 1 << power)


@given(size=sizes, smallest=smallests)
def test_a_bucket_holds_its_size_and_is_its_own_bucket(size, smallest):
    found = bucket(size, smallest)
    assert found >= max(size, smallest)
    assert bucket(found, smallest) == found


@given(size=sizes, more=st.integers(0, 1000), smallest=smallests)
def test_buckets_ascend_with_sizes(size, more, smallest):
    assert bucket(size, smallest) <= bucket(size + more, smallest)


@given(smallest=smallests, times=st.floats(2, 1000, exclude_min=True))
def test_at_most_a_third_of_a_bucket_is_padding(smallest, times):
    size = int(smallest * times) + 1
    assert 3 * (bucket(size, smallest) - size) <= bucket(size, smallest)


@pytest.mark.parametrize("smallest", [1, 4, 64])
@pytest.mark.parametrize("doublings", [2, 3, 5])
def test_there_are_two_buckets_for_each_doubling(smallest, doublings):
    low, high = smallest << (doublings - 1), smallest << doublings
    found = {bucket(size, smallest) for size in range(low + 1, high + 1)}
    assert found == {low * 3 // 2, high}


@pytest.mark.parametrize(
    ("tokens", "bucket_tokens"),
    [(1, 64), (64, 64), (65, 128), (129, 192), (193, 256), (257, 384), (4097, 6144)],
)
def test_chunk_buckets(tokens, bucket_tokens):
    assert chunk_bucket(tokens) == bucket_tokens
    assert bucket_tokens >= MIN_CHUNK_TOKENS


@given(rows=st.integers(1, 4096))
def test_row_buckets_are_the_powers_of_two_that_hold_the_rows(rows):
    found = row_bucket(rows)
    assert found & (found - 1) == 0
    assert found >= max(rows, MIN_ROWS)
    assert found == MIN_ROWS or found < 2 * rows
    assert row_bucket(found) == found
