"""`make demo`: a chat model reads a long document on four emulated elastic instances.

The document (John F. Kennedy's message to Congress of 25 May 1961, up to the passage on space)
is too long for the pool of one instance: four instances read it together, the KV is retained on
as few as hold it, and those go on to write the answer.
"""

from __future__ import annotations

import logging
import sys
import time
from importlib import resources

from loongjax.api.llm import LLM
from loongjax.cli.drawing import draw_request
from loongjax.sampling.params import SamplingParams

QUESTION = "Which great project in space does the President propose, and why?"
INSTANCES = 4
POOL_SLOTS = 4096  # for each instance: less than the document


def main() -> None:
    """Runs the demo and prints what happened."""
    logging.basicConfig(stream=sys.stderr, format="  [%(message)s]")
    logging.getLogger("loongjax").setLevel(logging.INFO)
    document = resources.files("loongjax.cli").joinpath("demo_document.txt").read_text("utf-8")
    print(f"loongjax: the demo model on {INSTANCES} emulated elastic instances", flush=True)
    with LLM("demo", instances=INSTANCES, pool_slots=POOL_SLOTS) as llm:
        assert llm.tokenizer is not None
        prompt = llm.tokenizer.encode_chat(
            [{"role": "user", "content": f"{document.strip()}\n\nQuestion: {QUESTION}"}]
        )
        print(f"\nA document of {len(document.split()):,} words, {len(prompt):,} tokens with:")
        print(f"  {QUESTION}\n", flush=True)
        started = time.monotonic()
        text = ""
        for chunk in llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=32)):
            text += chunk.text or ""
            print(chunk.text, end="", flush=True)
        print(f"\n\nWhat happened, in {time.monotonic() - started:.1f} s:\n")
        print(draw_request(llm.steps(), INSTANCES))
        print(f"\nThe model's answer:\n{text.strip()}")


if __name__ == "__main__":
    main()
