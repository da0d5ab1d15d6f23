"""The engine without a server, under the same closed loop, for `bench serve --bare`.

Takes the options of `loongjax serve`, and on stdin `{"clients", "questions": [[ids, tokens], …]}`;
prints `{"output_tokens_per_s", "duration_s"}`.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from loongjax.api.build import build_engine
from loongjax.cli.main import build_parser
from loongjax.cli.serve import serve_engine_config
from loongjax.engine import Engine, FinishedEvent, GenerationRequest
from loongjax.sampling.params import SamplingParams

_WARM_UP = 8


def main() -> int:
    """Measures, and prints one JSON object."""
    options = build_parser().parse_args(["serve", *sys.argv[1:]])
    work = json.load(sys.stdin)
    built = build_engine(options.model, serve_engine_config(options))
    with built.engine as engine:
        _run(engine, work["questions"][:_WARM_UP], clients=2, name="warm")
        duration_s = _run(engine, work["questions"], work["clients"], name="r")
    tokens = sum(count for _, count in work["questions"])
    report = {
        "output_tokens_per_s": round(tokens / duration_s, 1),
        "duration_s": round(duration_s, 3),
    }
    print(json.dumps(report), flush=True)
    return 0


def _run(engine: Engine, questions: list, clients: int, name: str) -> float:
    left = iter(enumerate(questions))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number, question = next(left, (0, None))
            if question is None:
                return
            params = SamplingParams(temperature=0, max_tokens=question[1], ignore_eos=True)
            handle = engine.submit(
                GenerationRequest(id=f"{name}{number}", token_ids=tuple(question[0]), params=params)
            )
            while not isinstance(handle.get(), FinishedEvent):
                pass

    began = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
