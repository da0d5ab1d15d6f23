"""`loongjax bench`: measurements, each a command of its own."""

from __future__ import annotations

import argparse

from loongjax.cli import bench_engine


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `bench` to the command's parser."""
    parser = commands.add_parser("bench", help="measure", description="Measures this machine.")
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    bench_engine.add_command(benches)
