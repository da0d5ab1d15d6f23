"""openvino-genai's continuous batching, stepped in the measuring process.

Runs in the peer's environment; see `loongjax.bench.worker`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class OpenVINO:
    """A continuous batching pipeline."""

    def __init__(self, pipeline: Any, genai: Any, tensor: Any) -> None:
        self._pipeline = pipeline
        self._genai = genai
        self._tensor = tensor
        self._requests = itertools.count()

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int
    ) -> Iterator[list[tuple[int, int]]]:
        """See `Subject`."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.set_eos_token_id(0)  # the model has none, and one is wanted
        config.ignore_eos = True
        config.do_sample = False
        handles = [
            self._pipeline.add_request(next(self._requests), self._tensor(prompt), config)
            for prompt in prompts
        ]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            yield [
                (number, token)
                for number, handle in enumerate(handles)
                if handle.can_read()
                for output in handle.read().values()
                for token in output.generated_ids
            ]

    def warmed(self) -> None:
        """It compiled what it compiles when it was loaded."""


def load(settings: dict[str, Any]) -> OpenVINO:
    """See `Subject`; settings: model (folder), dtype, threads, max_len, max_requests."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = settings["max_len"]
    scheduler.max_num_seqs = settings["max_requests"]
    scheduler.cache_size = 2  # GiB
    scheduler.enable_prefix_caching = False
    precision = {"float32": "f32", "bfloat16": "bf16"}[settings["dtype"]]
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(_translated(Path(settings["model"]))),
        scheduler,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": settings["threads"],
        },
    )

    def tensor(prompt: Sequence[int]) -> Any:
        return openvino.Tensor(np.array([prompt], np.int64))

    return OpenVINO(pipeline, openvino_genai, tensor)


def _translated(checkpoint: Path) -> Path:
    """The checkpoint in OpenVINO's format, kept beside it and made anew when it is older."""
    folder = checkpoint.with_name(f"{checkpoint.name}-openvino")
    made, weights = folder / "openvino_model.xml", checkpoint / "model.safetensors"
    if not made.exists() or made.stat().st_mtime < weights.stat().st_mtime:
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        main_export(
            str(checkpoint),
            folder,
            task="text-generation-with-past",
            ov_config=OVConfig(dtype="fp32"),
        )
    return folder
