"""The engine's statistics for Prometheus."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from llorch_jax.engine.core import Core
from llorch_jax.engine.statistics import Histogram

_COUNTERS = {
    "requests": "Requests queued.",
    "finished": "Requests answered in full.",
    "cancelled": "Requests cancelled by their callers, including by disconnecting.",
    "expired": "Requests that missed their deadline.",
    "preemptions": "Times that a running request had to give up its pages.",
    "failures": "Engine steps that raised an exception.",
    "steps": "Decode steps.",
    "prompt_tokens": "Prompt tokens of the requests that have been given a slot.",
    "cached_tokens": "Prompt tokens found in the prefix cache.",
    "new_tokens": "Tokens generated.",
}
_OFFLOAD_COUNTERS = {
    "saved": "Pages copied into the second pool.",
    "restored": "Pages copied back from the second pool.",
    "dropped": "Pages that had to make room for others in the second pool.",
}


class Collector:
    """The metrics at one moment; must be created in the engine's thread."""

    def __init__(self, core: Core) -> None:
        self._metrics = list(_metrics(core))

    def collect(self) -> Iterator[Metric]:
        """The metrics; called by prometheus_client's registry."""
        return iter(self._metrics)


def exposition(collector: Collector) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)


def _metrics(core: Core) -> Iterator[Metric]:
    found: Any = core.statistics
    for name, help in _COUNTERS.items():
        yield CounterMetricFamily(f"llorch_{name}", help, value=getattr(found, name))
    yield GaugeMetricFamily("llorch_running", "Requests that have a slot.", value=len(core.active))
    yield GaugeMetricFamily("llorch_waiting", "Requests waiting for a slot.", value=core.waiting)
    yield GaugeMetricFamily("llorch_slots", "Requests that can run at once.", value=core.slots)
    pages = core.pages.counts()
    states = GaugeMetricFamily("llorch_pages", "Pages of the cache by state.", labels=["state"])
    for state in ("held", "idle", "free"):
        states.add_metric([state], getattr(pages, state))
    yield states
    yield GaugeMetricFamily("llorch_pages_shared", "Pages that several requests hold.", value=pages.shared)
    offload = core.offload.store.counts()
    yield GaugeMetricFamily("llorch_offload_pages", "Pages in the second pool.", value=offload.pages)
    yield GaugeMetricFamily("llorch_offload_bytes", "Bytes of the pages in the second pool.", value=offload.bytes)
    for name, help in _OFFLOAD_COUNTERS.items():
        yield CounterMetricFamily(f"llorch_offload_{name}", help, value=getattr(offload, name))
    yield _histogram("llorch_time_to_first_token_seconds", "Time to the first token.", found.first_token)
    yield _histogram("llorch_inter_token_seconds", "Time between two tokens of a request.", found.between_tokens)


def _histogram(name: str, help: str, histogram: Histogram) -> HistogramMetricFamily:
    total, buckets = 0, []
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(name, help, buckets=buckets, sum_value=histogram.total)
