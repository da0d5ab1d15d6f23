"""transformers on torch: `generate`'s own steps without its bookkeeping, SDPA, a growing cache.

Runs in the peer's environment; see `loongjax.bench.worker`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any


class Transformers:
    """A causal language model of transformers."""

    def __init__(self, model: Any, torch: Any) -> None:
        self._model = model
        self._torch = torch

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int
    ) -> Iterator[list[tuple[int, int]]]:
        """See `Subject`. All prompts have one length."""
        torch = self._torch
        ids, cache = torch.tensor(prompts), None
        with torch.inference_mode():
            for _ in range(tokens):
                out = self._model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = out.past_key_values
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
                yield list(enumerate(ids[:, 0].tolist()))

    def warmed(self) -> None:
        """Nothing is compiled."""


def load(settings: dict[str, Any]) -> Transformers:
    """See `Subject`; settings: model (folder), dtype, threads."""
    os.environ["OMP_NUM_THREADS"] = str(settings["threads"])
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
    )
    return Transformers(model.eval(), torch)
