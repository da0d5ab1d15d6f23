"""The `loongjax` command: its subcommands, its exit codes, and its one line of JSON.

Results go to stdout, everything else to stderr. With `--json` the last line on stdout is
exactly one JSON object. Exit code 0: done; 1: it failed; 2: the user can mend it, and one
line on stderr says how; 3: done, but some lines of a file of prompts could not be answered.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from loongjax import __version__
from loongjax.cli import aot, bench, convert, doctor, generate, plan, profile, serve, simulate
from loongjax.errors import LinesError, LoongJaxError, UserError

_DESCRIPTION = """\
Serve long-context language models on JAX with elastic sequence parallelism: how many
accelerators work on a request changes while the request runs.
"""

_EPILOG = """\
examples:
  loongjax generate --model demo --chat --prompt "Why is the sky blue?"
  loongjax generate --model demo --instances 4 --prompt-file book.txt --max-tokens 100 --json
  loongjax serve --model demo --instances 4
  loongjax simulate --hardware a800x8 --workload sharegpt --rate 20
"""


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage. Subcommands get parsers of the same class,
    and each tells what it does not know itself: its own help is the one to look at.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `argparse` has it, but that nothing may be unknown."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Ends the command."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each puts its function into `run`."""
    parser: argparse.ArgumentParser = Parser(
        prog="loongjax",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loongjax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    aot.add_command(commands)
    bench.add_command(commands)
    convert.add_command(commands)
    generate.add_command(commands)
    plan.add_command(commands)
    profile.add_command(commands)
    serve.add_command(commands)
    simulate.add_command(commands)
    doctor.add_command(commands)
    return parser


def show_log() -> None:
    """Sends what loongjax logs to stderr, and of other libraries only warnings."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("loongjax").setLevel(logging.INFO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    show_log()
    try:
        options.run(options)
    except UserError as error:
        print(f"loongjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except LinesError as error:
        print(f"loongjax: {error}", file=sys.stderr)
        return 3
    except LoongJaxError as error:
        print(f"loongjax: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("loongjax: interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
