"""A server whose steps fail now and then, for `bench chaos`: `python -m … RATE SEED OPTIONS`.

The options are those of `loongjax serve`. A step fails before it has taken the KV pool, or
after, when the pool is gone: as launches do on hardware.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

from loongjax.api.build import BuiltEngine
from loongjax.cli.main import build_parser
from loongjax.cli.serve import run_server
from loongjax.errors import LoongJaxError


class Injected(Exception):
    """A failure that was wanted."""


def main() -> int:
    """Serves until it is asked to end."""
    rate, seed, *arguments = sys.argv[1:]
    options = build_parser().parse_args(["serve", *arguments])
    try:
        run_server(options, lambda built: _make_flaky(built, float(rate), int(seed)))
    except LoongJaxError as error:
        print(f"chaos server: {error}", file=sys.stderr)
        return 1
    return 0


def _make_flaky(built: BuiltEngine, rate: float, seed: int) -> None:
    chance = random.Random(seed)
    programs: Any = built.engine.executor.programs  # type: ignore[attr-defined]
    get = programs.get

    def get_flaky(*args: Any) -> Callable[..., Any]:
        program = get(*args)
        return _failing(program, chance) if chance.random() < rate else program

    programs.get = get_flaky


def _failing(program: Callable[..., Any], chance: random.Random) -> Callable[..., Any]:
    takes_pool = chance.random() < 0.5

    def call(*args: Any) -> Any:
        if takes_pool:
            program(*args)
        raise Injected("injected, after the pool was taken" if takes_pool else "injected")

    return call


if __name__ == "__main__":
    sys.exit(main())
