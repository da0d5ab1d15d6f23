"""vLLM on CPU: its engine, stepped in this process, without detokenizing or prefix caching.

One step takes a prompt of `max_len` tokens whole. Runs in the peer's environment; see
`loongjax.bench.worker`.
"""

from __future__ import annotations

import itertools
import os
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
    threads = settings["threads"]
    bound = hasattr(os, "sched_getaffinity")  # to the cores that all engines have
    cores = sorted(os.sched_getaffinity(0))[:threads] if bound else range(threads)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the step runs here, and its CPU time counts
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm

    llm = vllm.LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        skip_tokenizer_init=True,
        max_model_len=settings["max_len"],
        max_num_batched_tokens=settings["max_len"],
        max_num_seqs=settings["max_requests"],
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )
    return VLLM(llm.llm_engine, vllm)
