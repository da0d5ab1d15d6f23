"""Prometheus metrics: vLLM's names where it has a like metric, `loongjax:` for our own.

Counts that the engine keeps are read when somebody asks; what a request lived through is counted
when it ends; what steps did, as they end. Each server has a `Metrics` with a registry of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loongjax.engine import EngineStats, StepRecord
from serving.service import Report, Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 1000,
)  # fmt: skip
_TOKENS = tuple(10**e * m for e in range(7) for m in (1, 2, 5))
_LEAST_FOLLOWED = 1_000


class Metrics:
    """Metrics of one server."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": service.model_name}
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "To the first token.")
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Per token after the first, averaged over a request.",
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to end.")
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step."
        )
        self._prompt = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self._answer = self._histogram(
            "vllm:request_generation_tokens", "Answer tokens of a request.", _TOKENS
        )
        self._success = self._counters(
            "vllm:request_success", "Requests that ended, by reason.", "finished_reason"
        )
        self._failure = self._counters(
            "loongjax:request_failure", "Requests that ended with an error, by code.", "code"
        )
        self._scale_ups = self._counter(
            "loongjax:scale_ups", "Requests whose next step ran on more instances."
        )
        self._scale_downs = self._counter(
            "loongjax:scale_downs", "Requests whose next step ran on fewer instances."
        )
        self._migrated = self._counter("loongjax:migrated_tokens", "KV tokens that moved.")
        self._retained = self._counter(
            "loongjax:retained_tokens",
            "KV tokens of prefill steps that kept them on fewer instances than computed them.",
        )
        self._service = service
        self._degrees: dict[str, int] = {}
        self._most_followed = _LEAST_FOLLOWED
        self.registry.register(_EngineCollector(service))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)

    def observe(self, report: Report) -> None:
        """Counts a request that has ended."""
        if report.outcome in ("stop", "length", "abort"):
            self._success.labels(**self._labels, finished_reason=report.outcome).inc()
        else:
            self._failure.labels(**self._labels, code=report.outcome).inc()
        times = report.timings
        if times is None or report.error is not None:
            return
        self._prompt.observe(report.prompt_tokens)
        self._answer.observe(report.answer_tokens)
        self._e2e.observe(report.total_s)
        if times.first_scheduled is not None:
            queued = times.first_scheduled - times.arrival
            self._queue.observe(report.gate_s + queued)
        if times.first_token is not None:
            self._ttft.observe(report.gate_s + times.first_token - times.arrival)
            following = report.answer_tokens // report.call.params.n - 1
            if following > 0:
                per_token = (times.end - times.first_token) / following
                self._tpot.observe(per_token)

    def count_steps(self, records: Sequence[StepRecord]) -> None:
        """Counts steps that have ended."""
        for record in records:
            if record.error is not None:
                continue
            if record.kind == "migrate":
                self._migrated.inc(record.tokens)
                continue
            if record.kind == "prefill" and len(record.kept) < record.degree:
                self._retained.inc(sum(s.tokens for s in record.kept))
            for request in record.requests:
                self._follow(request, record.degree)
        if len(self._degrees) > self._most_followed:
            self._forget_ended()

    def _follow(self, request: str, degree: int) -> None:
        before = self._degrees.get(request, degree)
        self._degrees[request] = degree
        if degree > before:
            self._scale_ups.inc()
        elif degree < before:
            self._scale_downs.inc()

    def _forget_ended(self) -> None:
        """Keeps what is open; done when that may be less than half, so it costs next to nothing.

        Not when a request ends: a step that was queued for it may be told later.
        """
        names = self._service.engine_names()
        self._degrees = {name: at for name, at in self._degrees.items() if name in names}
        self._most_followed = 2 * len(self._degrees) + _LEAST_FOLLOWED

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        family = Histogram(name, text, list(self._labels), buckets=buckets, registry=self.registry)
        return family.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return self._counters(name, text).labels(**self._labels)

    def _counters(self, name: str, text: str, *labels: str) -> Counter:
        """Counters that have further labels, each of which is there once it has counted."""
        return Counter(name, text, [*self._labels, *labels], registry=self.registry)


class _EngineCollector(Collector):
    """What the engine counts by itself."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        """Nothing beforehand: names are fixed, and the engine need not be asked for them."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The counters as they are now."""
        service, stats = self._service, self._service.built.engine.stats()
        model = service.model_name
        used = sum(each.used for each in stats.instances)
        slots = sum(each.slots for each in stats.instances)
        waiting = stats.waiting + service.gate.waiting
        for name, text, value in (
            ("vllm:num_requests_running", "Requests that decode.", stats.running),
            ("vllm:num_requests_waiting", "Requests whose prompt has no KV yet.", waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV pool in use, 1 is all.", used / slots),
            (
                "loongjax:gate_waiting_tokens",
                "Prompt tokens at the gate.",
                service.gate.waiting_tokens,
            ),
            ("loongjax:engine_alive", "1 while the engine runs.", int(stats.alive)),
            ("loongjax:open_requests", "Requests without an end.", service.open_requests),
        ):
            yield _gauge(name, text, {"model_name": model}, value)
        for name, text, count in (
            ("vllm:prompt_tokens", "Tokens that prefill steps computed.", stats.prompt_tokens),
            ("vllm:generation_tokens", "Tokens handed out.", stats.generated_tokens),
            ("vllm:num_preemptions", "Requests whose KV was dropped.", stats.preemptions),
            ("loongjax:failed_steps", "Steps that failed.", stats.failed_steps),
            (
                "loongjax:recomputed_requests",
                "Requests that lost KV to a failed step and were computed anew.",
                stats.recomputed_requests,
            ),
            (
                "loongjax:compiles_after_warm_up",
                "Compilations that a step waited for.",
                stats.programs.compiled_after_warm_up,
            ),
        ):
            yield _counter(name, text, {"model_name": model}, count)
        yield _counter(
            "loongjax:service_cpu_seconds",
            "CPU time of the thread that serves; it is the one that is asked for this.",
            {"model_name": model},
            time.thread_time(),
        )
        yield from _by_part(stats, model)


def _by_part(stats: EngineStats, model: str) -> Iterator[Metric]:
    steps = CounterMetricFamily(
        "loongjax:steps", "Steps that succeeded.", labels=("model_name", "kind", "degree")
    )
    for each in stats.steps:
        steps.add_metric([model, each.kind, str(each.degree)], each.count)
    host = CounterMetricFamily(
        "loongjax:host_seconds",
        "Where the engine's thread spent its time; planning is the planner's.",
        labels=("model_name", "phase"),
    )
    for phase in stats.host:
        host.add_metric([model, phase.phase], phase.seconds)
    labels = ("model_name", "instance")
    used = GaugeMetricFamily("loongjax:instance_kv_used_slots", "KV slots in use.", labels=labels)
    draining = GaugeMetricFamily(
        "loongjax:instance_draining", "1 while it runs empty.", labels=labels
    )
    for instance in stats.instances:
        used.add_metric([model, str(instance.id)], instance.used)
        draining.add_metric([model, str(instance.id)], int(instance.draining))
    yield from (steps, host, used, draining)


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _counter(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = CounterMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family
