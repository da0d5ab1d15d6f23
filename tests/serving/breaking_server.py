"""A server whose engine dies of a request for 13 tokens; takes the options of `serve`."""

from __future__ import annotations

import sys

from loongjax.api.build import BuiltEngine
from loongjax.cli.main import build_parser
from loongjax.cli.serve import run_server
from loongjax.errors import LoongJaxError
from loongjax.plan import Plan, Snapshot
from loongjax.scheduler.policies.first_come import FirstCome

DEADLY = 13


class Superstitious:
    """First come, first served, but not for everyone."""

    def __init__(self) -> None:
        self._inner = FirstCome()

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        if any(view.max_tokens == DEADLY for view in snapshot.waiting):
            raise RuntimeError("somebody asked for 13 tokens")
        return self._inner.schedule(now, snapshot)


def prepare(built: BuiltEngine) -> None:
    built.engine.set_policy(Superstitious())


def main() -> int:
    options = build_parser().parse_args(["serve", *sys.argv[1:]])
    try:
        run_server(options, prepare)
    except LoongJaxError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
