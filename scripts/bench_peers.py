"""Installs the engines that loongjax is measured against, and measures all in turn.

    python scripts/bench_peers.py --install-only    minutes, some gigabytes, once
    python scripts/bench_peers.py                    prints {"cells": [...]} as the last line

`loongjax bench engine` measures the same and more, once they are installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from loongjax.bench.engine import measure_cells
from loongjax.bench.peers import PEERS, install
from loongjax.cli.bench_engine import add_bench_options, effort_of
from loongjax.cli.main import show_log
from loongjax.errors import LoongJaxError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if it failed, 2 where the user can mend it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_bench_options(parser)
    parser.add_argument("--install-only", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    show_log()
    folder = options.peers.expanduser()
    try:
        for peer in PEERS:
            install(peer, folder)
        if not options.install_only:
            cells = measure_cells(folder, effort_of(options))
            print(json.dumps({"cells": cells}), flush=True)
    except UserError as error:
        print(f"bench_peers: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except LoongJaxError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
