"""What the race detector of jax's TPU interpreter found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter


@contextmanager
def no_races() -> Iterator[None]:
    """Fails if a kernel interpreted inside, with `detect_races`, has a race."""
    yield
    assert interpreter.races is not None, "no kernel ran with detect_races"
    assert not interpreter.races.races_found
