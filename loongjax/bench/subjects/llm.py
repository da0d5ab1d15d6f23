"""`LLM.generate` on a file of prompts, for `loongjax bench offline`.

python -P llm.py SETTINGS INPUT OUTPUT
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from loongjax.api.llm import LLM
from loongjax.errors import BenchError
from loongjax.offline.native import as_json
from loongjax.sampling.params import SamplingParams


def answer_file(llm: LLM, source: Path, target: Path) -> float:
    """Answers all lines at once; returns the seconds from reading to having written them."""
    began = time.perf_counter()
    with source.open() as stream:
        lines = [json.loads(line) for line in stream]
    params = [
        SamplingParams(temperature=0, max_tokens=line["max_tokens"], ignore_eos=line["ignore_eos"])
        for line in lines
    ]
    outputs = llm.generate([line["prompt"] for line in lines], params)
    with target.open("w") as stream:
        for number, output in enumerate(outputs, start=1):
            stream.write(json.dumps({"line": number, **as_json(output.outputs[0])}) + "\n")
    return time.perf_counter() - began


def main() -> None:
    """Loads, warms up, answers; raises BenchError if a program was made while time was taken."""
    settings, source, target = sys.argv[1:]
    with LLM(**json.loads(settings), warm_up=True) as llm:
        seconds = answer_file(llm, Path(source), Path(target))
        if made := llm.stats().programs.compiled_after_warm_up:
            raise BenchError(f"{made} programs were compiled while time was taken")
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
