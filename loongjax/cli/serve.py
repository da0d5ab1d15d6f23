"""`loongjax serve`: a server in front of an engine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loongjax.cli.options import add_engine_options, add_json_option, llm_arguments
from loongjax.config import EngineConfig, engine_config
from loongjax.errors import ConfigError

if TYPE_CHECKING:
    from loongjax.api.build import BuiltEngine
    from serving.config import ServeConfig

_KEPT_STEPS = 10_000

_EPILOG = """\
examples:
  loongjax serve --model demo --instances 4 --http-port 8000
  loongjax serve --model ./checkpoint --port 0 --json
  loongjax serve --model demo --host 0.0.0.0 --token-file t --tls-cert c.pem --tls-key k.pem
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `serve` to the command's parser."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over gRPC and HTTP",
        description="Serves a model over gRPC, and over HTTP as OpenAI's clients speak it, until "
        "SIGTERM or Ctrl-C; then open requests may end.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_options(parser)
    _add_server_options(parser)
    _add_guard_options(parser)
    _add_limit_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)"
    )
    group.add_argument(
        "--port", type=int, default=50051, help="of gRPC; 0 takes a free one (default 50051)"
    )
    group.add_argument(
        "--http-port", type=int, metavar="PORT", help="of HTTP; 0 takes a free one (default: none)"
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="what clients call it (default: --model)"
    )
    group.add_argument(
        "--grace-s",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that open requests may go on after SIGTERM (default 30)",
    )
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="of stderr (default text)"
    )
    group.add_argument(
        "--profile-dir", type=Path, metavar="DIR", help="where profiles go (default: none are made)"
    )


def _add_guard_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("guards")
    group.add_argument(
        "--insecure",
        action="store_true",
        help="serve whoever reaches an address beyond this machine",
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM")
    group.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="clients need a certificate signed by one of these",
    )
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="who may generate: a line NAME TOKEN each; read again when it changes",
    )
    group.add_argument(
        "--cluster-token-file",
        type=Path,
        metavar="FILE",
        help="who may steer and profile; without it everybody, or, with --token-file, nobody",
    )


def _add_limit_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    for flag, default, text in (
        ("--max-requests", 256, "requests that the engine has at once"),
        ("--max-queue", 1024, "requests that wait for a turn"),
        ("--max-client-requests", None, "requests that one client has open"),
        ("--max-prompt-tokens", None, "tokens of one prompt"),
        ("--max-waiting-tokens", None, "prompt tokens of the requests that wait"),
        ("--max-message-mib", 256, "size of one message [MiB]"),
    ):
        said = "no limit of its own" if default is None else default
        group.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default {said})"
        )


def run(options: argparse.Namespace) -> None:
    """Serves until it is asked to end, and ends the process."""
    run_server(options, lambda built: None)


def run_server(options: argparse.Namespace, prepare: Callable[[BuiltEngine], object]) -> None:
    """Serves until it is asked to end, and ends the process.

    Before the first request `prepare` gets the engine.
    """
    began = time.monotonic()
    try:
        from serving import preflight
        from serving.logs import set_up
        from serving.process import Addresses, serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs the package of {error.name}; pip install 'loongjax[serve]'"
        ) from error
    from loongjax.api.build import build_engine

    config = _serve_config(options)
    set_up(options.log_format)
    preflight.check(config)
    built = build_engine(options.model, serve_engine_config(options))
    prepare(built)

    def say_ready(addresses: Addresses) -> None:
        startup_s = round(time.monotonic() - began, 3)
        report = {
            "ready": True,
            "grpc": addresses.grpc,
            "http": addresses.http,
            "startup_s": startup_s,
            "programs": dataclasses.asdict(built.engine.stats().programs),
        }
        if options.json:
            print(json.dumps(report), flush=True)
        else:
            where = " and ".join(filter(None, (f"gRPC at {addresses.grpc}", addresses.http)))
            print(f"serving {where} after {startup_s} s", file=sys.stderr)

    serve(built, options.served_model_name or options.model, config, say_ready)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)  # the interpreter would take a second and more to take jax's modules apart


def serve_engine_config(options: argparse.Namespace) -> EngineConfig:
    """The engine that the options ask for; it makes every program before it is ready.

    Nobody looks back at a server's steps: who wants to see them follows them.
    """
    config = engine_config(**llm_arguments(options), warm_up=True)
    return dataclasses.replace(config, kept_steps=_KEPT_STEPS)


def _serve_config(options: argparse.Namespace) -> ServeConfig:
    from serving.config import Limits, ServeConfig, TlsConfig

    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together; give both or neither")
    tls = None
    if options.tls_cert is not None:
        tls = TlsConfig(cert=options.tls_cert, key=options.tls_key, client_ca=options.tls_client_ca)
    elif options.tls_client_ca is not None:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    return ServeConfig(
        host=options.host,
        port=options.port,
        http_port=options.http_port,
        insecure=options.insecure,
        tls=tls,
        token_file=options.token_file,
        cluster_token_file=options.cluster_token_file,
        limits=Limits(
            max_requests=options.max_requests,
            max_queue=options.max_queue,
            max_client_requests=options.max_client_requests,
            max_prompt_tokens=options.max_prompt_tokens,
            max_waiting_tokens=options.max_waiting_tokens,
            max_message_mib=options.max_message_mib,
        ),
        grace_s=options.grace_s,
        profile_dir=options.profile_dir,
    )
