"""One function rounds sizes up: monotone, at rest on its own results, and coarse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.programs.buckets import MIN_CHUNK_TOKENS, chunk_bucket, row_bucket

buckets = st.sampled_from([(chunk_bucket, MIN_CHUNK_TOKENS), (row_bucket, 1)])
sizes = st.integers(0, 2**20)


@given(rounding=buckets, size=sizes, more=st.integers(0, 1000))
def test_a_bucket_holds_its_size_is_its_own_bucket_and_ascends(rounding, size, more):
    bucket, smallest = rounding
    found = bucket(size)
    assert found >= max(size, smallest)
    assert bucket(found) == found
    assert found <= bucket(size + more)


@given(size=st.integers(513, 2**20))
def test_less_than_half_of_a_chunk_beyond_the_second_bucket_is_padding(size):
    assert size <= chunk_bucket(size) < 2 * size


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [(1, 128), (128, 128), (129, 512), (512, 512), (513, 1024), (2000, 2048), (4097, 8192)],
)
def test_chunk_buckets(tokens, bucket):
    assert chunk_bucket(tokens) == bucket


@pytest.mark.parametrize(
    ("rows", "bucket"), [(0, 1), (1, 1), (2, 8), (8, 8), (9, 32), (32, 32), (33, 128)]
)
def test_row_buckets(rows, bucket):
    assert row_bucket(rows) == bucket
