"""`loongjax generate --input FILE`: a whole file of prompts, answered here or by a server."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import re
import sys
from pathlib import Path

from loongjax.api.build import build_engine
from loongjax.cli.options import llm_arguments
from loongjax.config import engine_config
from loongjax.errors import ConfigError, LinesError, LoongJaxError, UserError
from loongjax.offline.engine_backend import EngineBackend
from loongjax.offline.job import Job, JobReport
from loongjax.offline.native import NativeFormat
from loongjax.offline.output import Output
from loongjax.offline.progress import Progress, job_progress
from loongjax.offline.records import open_records
from loongjax.offline.task import Format
from loongjax.offline.template import PromptTemplate
from loongjax.sampling.params import SamplingParams

_KEPT_STEPS = 1_000
_ONLY_WITH_INPUT = ("output", "overwrite", "template", "server", "server_ca", "server_token_file")


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """The options beside `--input`."""
    group = parser.add_argument_group("with --input")
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSONL, a line for each record; goes on where an earlier run stopped",
    )
    group.add_argument("--overwrite", action="store_true", help="start anew instead")
    group.add_argument(
        "--format",
        choices=("native", "openai"),
        default="native",
        help='of the lines: {"id", "prompt" or "messages", sampling fields}, or those of OpenAI\'s '
        "batch files (default native)",
    )
    group.add_argument(
        "--template",
        metavar="TEXT",
        help="the prompt, with names of columns in braces, such as 'Summarise: {text}'",
    )
    group.add_argument(
        "--order",
        choices=("policy", "longest"),
        default="policy",
        help="who begins first: as the policy finds them in the file, or the longest, which needs "
        "the whole file in memory (default policy)",
    )
    group.add_argument(
        "--in-flight",
        type=int,
        default=512,
        metavar="N",
        help="records in work at once (default 512); memory for their prompts",
    )
    group.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="ask the gRPC side of `loongjax serve` instead of --model",
    )
    group.add_argument(
        "--server-token-file", type=Path, metavar="FILE", help="the bearer token for it"
    )
    group.add_argument(
        "--server-ca",
        type=Path,
        metavar="FILE",
        help="encrypt, and trust servers whose certificate one of these has signed, PEM",
    )
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="what OpenAI bodies must call the model (default: --model; of a server, anything)",
    )


def refuse_without_input(options: argparse.Namespace) -> None:
    """Raises ConfigError for what makes no sense for a single prompt."""
    for name in _ONLY_WITH_INPUT:
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')} needs --input")


def run_job(options: argparse.Namespace, params: SamplingParams, unset: SamplingParams) -> None:
    """Answers the file and prints what it came to. `params` are those of the flags, `unset` what
    they would be without any.

    Raises:
      LinesError: It is done, but some lines are errors.
      LoongJaxError: It could not be begun or ended, or some lines failed.
    """
    _check(options)
    source = open_records(options.input)
    form = _format(options, params, unset)
    with Output(options.output, form, overwrite=options.overwrite) as output:
        job = Job(
            source=source,
            output=output,
            form=form,
            order=options.order,
            in_flight=options.in_flight,
        )
        report, broken = job.report(), None
        if not job.is_done:
            with job_progress(report.lines, report.resumed) as progress:
                try:
                    run = _run_on_server if options.server else _run_here
                    report = run(options, job, progress)
                except UserError:
                    raise
                except LoongJaxError as error:
                    report, broken = dataclasses.replace(job.report(), failure=str(error)), error
    if options.json:
        print(json.dumps(dataclasses.asdict(report)), flush=True)
    else:
        print(_summary(report), file=sys.stderr)
    if broken is not None:
        raise broken
    _raise_unless_good(report, output.path)


def _check(options: argparse.Namespace) -> None:
    if options.output is None:
        raise ConfigError("--input needs --output, the file for the answers")
    if options.output.exists() and options.output.samefile(options.input):
        raise ConfigError(f"{options.output} is input and output at once; choose another output")
    if (options.model is None) == (options.server is None):
        raise ConfigError("give --model or --server, and not both")
    if options.server is not None and not re.fullmatch(r".+:\d+", options.server):
        raise ConfigError(f"--server is HOST:PORT, such as localhost:50051, not {options.server!r}")
    if options.server is None and (options.server_token_file or options.server_ca):
        raise ConfigError("--server-token-file and --server-ca need --server")
    if options.format == "openai" and (options.template or options.chat):
        raise ConfigError("--template and --chat are for native lines; OpenAI bodies say it all")


def _format(options: argparse.Namespace, params: SamplingParams, unset: SamplingParams) -> Format:
    if options.format == "native":
        template = None if options.template is None else PromptTemplate(options.template)
        return NativeFormat(defaults=params, template=template, chats=options.chat)
    if params != unset:
        raise ConfigError("OpenAI bodies bring their own sampling; leave out the flags for it")
    try:
        from serving.offline.openai_batch import OpenAIBatchFormat
    except ModuleNotFoundError as error:
        raise _lacks(error) from error
    return OpenAIBatchFormat(model=options.served_model_name or options.model)


def _run_here(options: argparse.Namespace, job: Job, progress: Progress) -> JobReport:
    config = engine_config(**llm_arguments(options), warm_up=options.warm_up)
    config = dataclasses.replace(config, kept_steps=_KEPT_STEPS)
    built = build_engine(options.model, config)
    with built.engine:
        return asyncio.run(job.run(EngineBackend(built.engine, built.tokenizer), progress))


def _run_on_server(options: argparse.Namespace, job: Job, progress: Progress) -> JobReport:
    try:
        from serving.client import AsyncClient, ClientTls, RetryPolicy
        from serving.offline.server_backend import ServerBackend
    except ModuleNotFoundError as error:
        raise _lacks(error) from error

    async def run() -> JobReport:
        client = AsyncClient(
            options.server,
            token=_token(options.server_token_file),
            tls=None if options.server_ca is None else ClientTls(ca=options.server_ca),
            retry=RetryPolicy(attempts=8),
        )
        async with client:
            return await job.run(ServerBackend(client), progress)

    return asyncio.run(run())


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token cannot be read: {error}") from error


def _lacks(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(f"this needs the package of {error.name}; pip install 'loongjax[serve]'")


def _summary(report: JobReport) -> str:
    rate = report.generated_tokens / report.seconds if report.seconds else 0.0
    return (
        f"{report.lines} lines: {report.answered} answered now, {report.resumed} done before, "
        f"{report.errors} errors; {report.generated_tokens} tokens in {report.seconds:.1f} s "
        f"({rate:.1f} tokens/s)"
    )


def _raise_unless_good(report: JobReport, output: Path) -> None:
    if report.failed:
        raise LoongJaxError(
            f"{report.failed} of {report.lines} lines failed, the first one so: {report.failure}; "
            "run the command again to try them once more"
        )
    if report.errors:
        raise LinesError(
            f"{report.errors} of {report.lines} lines cannot be answered; their lines in {output} "
            "say why"
        )
