"""Which programs an engine can run, and which of them a step takes.

The one place that makes a `ProgramSpec`: what warm-up compiles and what steps ask for cannot
differ. Pure: says nothing of what is compiled already (`library`) or on disk (`store`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loongjax.plan import Group, Topology
from loongjax.programs.buckets import MIGRATE_TOKENS, chunk_bucket, row_bucket
from loongjax.programs.spec import ProgramSpec


def compiled_per_group(platform: str) -> bool:
    """Whether compiled code depends on which devices run it: on TPU, routing is compiled in."""
    return platform == "tpu"


class Catalogue:
    """The programs for a topology and the limits of a step.

    For each degree: a program for each chunk bucket, a decode program for each row bucket, and,
    from degree 2 on, one that migrates. Of the chunk buckets every second one, the largest among
    them, is of extend programs, which take chunks with history; they serve those without as well,
    over which their loops make no trip. So a step with history, such as one that carries decodes
    along, is rounded up by more than others, and there are no more programs than sizes.

    Attributes:
      topology: The groups.
      max_chunk_tokens: Prompt tokens for each rank of a step, a bucket.
      max_rows: Rows for each rank of a decode step, a bucket.
      placed: Whether each group has programs of its own (see `compiled_per_group`).
    """

    def __init__(
        self, topology: Topology, *, max_chunk_tokens: int, max_rows: int, placed: bool
    ) -> None:
        """Both limits are rounded up to a bucket."""
        self.topology = topology
        self.max_chunk_tokens = chunk_bucket(max_chunk_tokens)
        self.max_rows = row_bucket(max_rows)
        self.placed = placed

    @property
    def chunk_buckets(self) -> tuple[int, ...]:
        """Local tokens of programs for chunks, ascending."""
        return tuple(_ladder(chunk_bucket, self.max_chunk_tokens))

    @property
    def extend_buckets(self) -> tuple[int, ...]:
        """Those of them that take history, ascending: the last, and every second one before it but
        the first.
        """
        return self.chunk_buckets[:0:-2][::-1] or self.chunk_buckets

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Rows of the decode programs, ascending."""
        return tuple(_ladder(row_bucket, self.max_rows))

    @property
    def specs(self) -> tuple[ProgramSpec, ...]:
        """Every program, each once, by degree. Placed ones group by group."""
        found = []
        for degree in self.topology.degrees:
            groups = self.topology.groups(degree)
            for group in groups if self.placed else groups[:1]:
                found += [self.prefill(group, size) for size in self.chunk_buckets]
                found += [self.decode(group, size) for size in self.row_buckets]
                found += [self.migrate(group)] if degree > 1 else []
        return tuple(found)

    def prefill(self, group: Group, tokens: int) -> ProgramSpec:
        """For chunks that begin their requests, `tokens` on each rank in all."""
        size = chunk_bucket(tokens)
        if size in self.extend_buckets:
            return self.extend(group, size)
        return ProgramSpec(
            kind="prefill",
            degree=len(group),
            bucket=size,
            rows=self.max_rows,
            placement=self._placement(group),
        )

    def extend(self, group: Group, tokens: int) -> ProgramSpec:
        """For chunks of which some have history, `tokens` on each rank in all."""
        return ProgramSpec(
            kind="extend",
            degree=len(group),
            bucket=next(size for size in self.extend_buckets if size >= tokens),
            rows=self.max_rows,
            placement=self._placement(group),
        )

    def decode(self, group: Group, rows: int) -> ProgramSpec:
        """For `rows` tokens on the fullest rank."""
        size = row_bucket(rows)
        return ProgramSpec(
            kind="decode",
            degree=len(group),
            bucket=size,
            rows=size,
            placement=self._placement(group),
        )

    def migrate(self, group: Group) -> ProgramSpec:
        """For moves inside the group; longer ones take several launches."""
        return ProgramSpec(
            kind="migrate",
            degree=len(group),
            bucket=MIGRATE_TOKENS,
            rows=1,
            placement=self._placement(group),
        )

    def _placement(self, group: Group) -> Group | None:
        return group if self.placed else None


def _ladder(bucket: Callable[[int], int], largest: int) -> Iterator[int]:
    """Every bucket up to `largest`, which is one."""
    size = 1
    while True:
        size = bucket(size)
        yield size
        if size >= largest:
            return
        size += 1
