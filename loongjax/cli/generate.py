"""`loongjax generate`: one prompt and its answer, or a whole file of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from loongjax.api.llm import LLM
from loongjax.api.outputs import RequestOutput
from loongjax.cli.job import add_job_options, refuse_without_input, run_job
from loongjax.cli.options import add_engine_options, add_json_option, llm_arguments
from loongjax.cli.sampling import add_sampling_options, sampling_params, without_flags
from loongjax.errors import ConfigError, RequestError
from loongjax.offline.native import as_json

_EPILOG = """\
examples:
  loongjax generate --model demo --chat --prompt "Why is the sky blue?" --max-tokens 60
  loongjax generate --model demo --instances 4 --prompt-file book.txt --json
  loongjax generate --model random:bench58m --token-ids-file ids.json --ignore-eos --json
  loongjax generate --model demo --chat --input prompts.jsonl --output answers.jsonl
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `generate` to the command's parser."""
    parser = commands.add_parser(
        "generate",
        help="answer one prompt, or a file of them",
        description="Answers one prompt, or every record of a file, on one or more elastic "
        "instances of this machine; a file also by a running server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_options(parser, needs_model=False)
    parser.add_argument(
        "--warm-up",
        action="store_true",
        help="make all programs first, not only those that this prompt needs",
    )
    prompt = parser.add_argument_group("prompt (one of)").add_mutually_exclusive_group(
        required=True
    )
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 text file")
    prompt.add_argument("--token-ids-file", metavar="FILE", help="a JSON list of token ids")
    prompt.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="many prompts: .jsonl, .csv or .parquet; needs --output",
    )
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )
    add_sampling_options(parser)
    add_job_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Answers the prompt, or the file, and prints the text, or the JSON object."""
    params = sampling_params(options)
    if options.input is not None:
        run_job(options, params, unset=without_flags())
        return
    refuse_without_input(options)
    if options.model is None:
        raise ConfigError("give --model, such as demo")
    prompt = read_prompt(options)
    with LLM(options.model, **llm_arguments(options), warm_up=options.warm_up) as llm:
        if options.chat:
            if not isinstance(prompt, str):
                raise RequestError("--chat needs a text; token ids are taken as they are")
            output = llm.chat([{"role": "user", "content": prompt}], params)
        else:
            output = llm.generate(prompt, params)[0]
        report = describe(llm, output)
    if options.json:
        print(json.dumps(report), flush=True)
    else:
        for answer in output.outputs:
            print(answer.token_ids if answer.text is None else answer.text, flush=True)
        print(summary(report), file=sys.stderr)


def read_prompt(options: argparse.Namespace) -> str | list[int]:
    """The prompt from whichever option gave it.

    Raises RequestError when a file cannot be read or does not hold what it should.
    """
    if options.prompt is not None:
        return _not_empty(options.prompt, "--prompt")
    path = Path(options.prompt_file or options.token_ids_file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {error}") from error
    if options.prompt_file:
        return _not_empty(text, str(path))
    try:
        ids = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}") from error
    if not isinstance(ids, list) or not all(type(item) is int for item in ids):
        raise RequestError(f"{path} must hold a JSON list of whole numbers, such as [1, 2, 3]")
    if not ids:
        raise RequestError(f"the prompt in {path} is empty; give at least one token id")
    return ids


def _not_empty(prompt: str, source: str) -> str:
    if not prompt:
        raise RequestError(f"the prompt in {source} is empty; give at least one character")
    return prompt


def describe(llm: LLM, output: RequestOutput) -> dict[str, Any]:
    """What `--json` prints."""
    stats = llm.stats()
    answers = [as_json(answer) for answer in output.outputs]
    return {
        **answers[0],
        **({"outputs": answers} if len(answers) > 1 else {}),
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(answer.token_ids) for answer in output.outputs),
        "steps": [
            {
                "kind": run.kind,
                "degree": run.degree,
                "instances": list(run.instances),
                "count": run.count,
            }
            for run in output.steps
        ],
        "programs": dataclasses.asdict(stats.programs),
        "ttft_s": output.ttft_s,
        "decode_tokens_per_s": output.decode_tokens_per_s,
        "pool": {
            "slots": llm.engine.pool_slots,
            "used_after": sum(instance.used for instance in stats.instances),
        },
    }


def summary(report: dict[str, Any]) -> str:
    """One line for people."""
    rate = report["decode_tokens_per_s"]
    return (
        f"{report['prompt_tokens']} prompt tokens, {report['completion_tokens']} generated "
        f"({report['finish_reason']}); first after {report['ttft_s']:.2f} s"
        + (f", then {rate:.1f} tokens/s" if rate else "")
    )
