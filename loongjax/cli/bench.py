"""`loongjax bench`: what was measured on this machine, a subcommand for each part."""

from __future__ import annotations

import argparse

from loongjax.cli import (
    bench_chaos,
    bench_engine,
    bench_offline,
    bench_policies,
    bench_scheduler,
    bench_serve,
)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `bench` and its parts to the command's parser."""
    parser = commands.add_parser("bench", help="measure a part of loongjax on this machine")
    parts = parser.add_subparsers(title="parts", metavar="PART", required=True)
    bench_engine.add_command(parts)
    bench_offline.add_command(parts)
    bench_policies.add_command(parts)
    bench_scheduler.add_command(parts)
    bench_serve.add_command(parts)
    bench_chaos.add_command(parts)
