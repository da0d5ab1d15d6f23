"""What a program is told of how each row's token is chosen, and what it says of the choice.

Both sides read this: the host, which writes a few numbers for each row and, for rows that need
it, a *table* of the vocabulary; and the program (`loongjax.sampling.device`). Imports no jax.

A table is int32 [2, V]. Row 0 has a note on each token: how often it was generated (`COUNT`),
whether the prompt has it (`PROMPT`), whether it would end the answer (`END`). Row 1 has what is
added to its logit, as float32 bits; minus infinity forbids it.
"""

from __future__ import annotations

import numpy as np

MAX_LOGPROBS = 20
"""Most likely tokens that are told of at a position."""

RECENT = 16
"""Tokens that a decode step adds to its rows' tables; with more, the tables are sent anew."""

NO_TOKEN = -1

COUNT = (1 << 24) - 1
PROMPT = 1 << 24
END = 1 << 25

FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
INTS = ("seed", "sample", "top_k", "first_end", "is_noted", "is_cut", "is_scored")
FIELDS = (*FLOATS, *INTS)
"""Of each row, the same in all of a request's steps. A field that asks for nothing is 0.

`first_end` is the position from which on an end token may be chosen. `is_noted` rows have a table;
`is_cut` rows leave out unlikely tokens; of `is_scored` rows log-probabilities are wanted.
"""

SAID = 3 + 2 * MAX_LOGPROBS
"""Numbers that a program says of each choice: the token; its log-probability, as float32 bits;
its rank, 1 for the most likely; the most likely tokens; and their log-probabilities. All but the
token are 0 where no row of the step is `is_scored`.
"""


def float_bits(value: float) -> int:
    """A float32 as it stands in a step's int32 inputs."""
    return int(np.float32(value).view(np.int32))
