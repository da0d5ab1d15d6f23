"""vLLM on CPU: its engine, stepped in this process, without detokenizing or prefix caching.

One step takes a prompt of `max_len` tokens whole. Runs in the peer's environment; see
`loongjax.bench.worker`. `loongjax bench offline` runs it as a program, `python -P vllm.py SETTINGS
INPUT OUTPUT`: then `vllm.LLM.generate` answers a file of prompts, in the steps that vLLM chooses.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any


class VLLM:
    """vLLM's engine."""

    def __init__(self, engine: Any, vllm: Any) -> None:
        self._engine = engine
        self._vllm = vllm
        self._jobs = itertools.count()

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int
    ) -> Iterator[list[tuple[int, int]]]:
        """See `Subject`."""
        job = next(self._jobs)
        params = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )
        numbers = {f"{job}-{number}": number for number in range(len(prompts))}
        for (name, _), prompt in zip(numbers.items(), prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        while self._engine.has_unfinished_requests():
            yield [
                (numbers[output.request_id], token)
                for output in self._engine.step()
                for token in output.outputs[0].token_ids
            ]

    def warmed(self) -> None:
        """It compiled what it compiles when it started."""


def load(settings: dict[str, Any]) -> VLLM:
    """See `Subject`; settings: model (folder), dtype, threads, max_len, max_requests."""
    vllm = _vllm(settings["threads"], kv_gib=2)
    llm = vllm.LLM(
        **_model(settings),
        max_model_len=settings["max_len"],
        max_num_batched_tokens=settings["max_len"],
        max_num_seqs=settings["max_requests"],
    )
    return VLLM(llm.llm_engine, vllm)


def answer_file(vllm: Any, llm: Any, source: str, target: str) -> float:
    """Answers all lines at once; returns the seconds from reading to having written them."""
    began = time.perf_counter()
    with open(source) as stream:
        lines = [json.loads(line) for line in stream]
    params = [
        vllm.SamplingParams(
            temperature=0.0,
            max_tokens=line["max_tokens"],
            ignore_eos=line["ignore_eos"],
            detokenize=False,
        )
        for line in lines
    ]
    # The model's tokens are bytes.
    prompts = [{"prompt_token_ids": list(line["prompt"].encode())} for line in lines]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    with open(target, "w") as stream:
        for number, output in enumerate(outputs, start=1):
            answer = {"line": number, "token_ids": list(output.outputs[0].token_ids)}
            stream.write(json.dumps(answer) + "\n")
    return time.perf_counter() - began


def main() -> None:
    """Loads, answers a little, so that all is compiled, and then the file.

    Settings: model (folder), dtype, threads, max_len.
    """
    settings, source, target = json.loads(sys.argv[1]), *sys.argv[2:]
    vllm = _vllm(settings["threads"], kv_gib=4)
    llm = vllm.LLM(**_model(settings), max_model_len=settings["max_len"])
    params = vllm.SamplingParams(temperature=0.0, detokenize=False)
    llm.generate([{"prompt_token_ids": [1] * 64}] * 8, params, use_tqdm=False)
    print(json.dumps({"seconds": answer_file(vllm, llm, source, target)}))


def _vllm(threads: int, *, kv_gib: int) -> Any:
    """The package, told what it reads from its environment alone."""
    bound = hasattr(os, "sched_getaffinity")  # to the cores that all engines have
    cores = sorted(os.sched_getaffinity(0))[:threads] if bound else range(threads)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the step runs here, and its CPU time counts
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm

    return vllm


def _model(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that are always the same."""
    return {
        "model": settings["model"],
        "dtype": settings["dtype"],
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
    }


if __name__ == "__main__":
    main()
