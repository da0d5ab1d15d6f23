"""`loongjax serve`: a server in front of an engine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time

from loongjax.cli.options import add_engine_options, add_json_option, llm_arguments
from loongjax.config import engine_config
from loongjax.errors import ConfigError

_EPILOG = """\
examples:
  loongjax serve --model demo --instances 4
  loongjax serve --model ./checkpoint --port 0 --json
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `serve` to the command's parser."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over gRPC",
        description="Serves a model over gRPC, until SIGTERM or Ctrl-C; then open requests may "
        "end.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_options(parser)
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)"
    )
    server.add_argument(
        "--port", type=int, default=50051, help="of gRPC; 0 takes a free one (default 50051)"
    )
    server.add_argument(
        "--insecure",
        action="store_true",
        help="serve whoever reaches an address beyond this machine",
    )
    server.add_argument(
        "--max-requests",
        type=int,
        default=1024,
        metavar="N",
        help="requests open at once, those that wait included (default 1024)",
    )
    server.add_argument(
        "--grace-s",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that open requests may go on after SIGTERM (default 30)",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serves until it is asked to end."""
    began = time.monotonic()
    try:
        from serving.config import ServeConfig
        from serving.process import Addresses, serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs the package of {error.name}; pip install 'loongjax[serve]'"
        ) from error
    from loongjax.api.build import build_engine

    config = ServeConfig(
        host=options.host,
        port=options.port,
        insecure=options.insecure,
        max_requests=options.max_requests,
        grace_s=options.grace_s,
    )
    built = build_engine(options.model, engine_config(**llm_arguments(options), warm_up=True))

    def say_ready(addresses: Addresses) -> None:
        startup_s = round(time.monotonic() - began, 3)
        report = {
            "ready": True,
            "grpc": addresses.grpc,
            "startup_s": startup_s,
            "programs": dataclasses.asdict(built.engine.stats().programs),
        }
        if options.json:
            print(json.dumps(report), flush=True)
        else:
            print(f"serving gRPC at {addresses.grpc} after {startup_s} s", file=sys.stderr)

    serve(built, options.model, config, say_ready)
