"""What a program is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from loongjax.esp.meta import Kind, MetaLayout, meta_layout
from loongjax.plan import Group


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class ProgramSpec:
    """One compiled program.

    Attributes:
      kind: `prefill` computes chunks that begin their requests, `extend` such with history,
        `decode` one token for each row; `migrate` moves KV.
      degree: Instances of the groups it runs on.
      bucket: Local tokens of each rank (prefill, extend), rows of each rank (decode), or tokens
        that a rank sends to each other in one launch (migrate).
      rows: Rows of each rank that sample a token.
      placement: The one group that it runs on, where routing is compiled in; None where a
        program can be rebound to any group of its degree.
    """

    kind: Kind
    degree: int
    bucket: int
    rows: int
    placement: Group | None = None

    @property
    def name(self) -> str:
        """A short readable name."""
        place = "" if self.placement is None else "-on-" + "-".join(map(str, self.placement))
        return f"{self.kind}-d{self.degree}-t{self.bucket}-r{self.rows}{place}"

    @property
    def outputs(self) -> int:
        """What a program puts out beside the pool: what is said of sampled tokens, and of
        prompts.
        """
        return 2 if self.kind in ("prefill", "extend") else 1

    @property
    def layout(self) -> MetaLayout:
        """The small inputs of one rank."""
        return meta_layout(self.kind, self.degree, self.bucket, self.rows)
