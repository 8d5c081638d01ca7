"""Prometheus metrics, the same for all engines, with the meanings that vLLM gives them.

Labels are the model's name, the artifact's version and the key's id. None of their values comes
from a client, who could otherwise create any number of time series.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LABELS = ("model", "version", "key")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)


class Metrics:
    """The metrics that `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, about: str, labels: tuple[str, ...] = _LABELS) -> Counter:
            return Counter(f"spotforge_{name}", about, labels, registry=registry)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"spotforge_{name}", about, ("model", "version"), registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(
                f"spotforge_{name}", about, _LABELS, registry=registry, buckets=buckets
            )

        self.running = gauge("num_requests_running", "Sequences in the engine.")
        self.waiting = Gauge(
            "spotforge_num_requests_waiting", "Requests in the queue.", registry=registry
        )
        self.kv_cache_usage = gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.")
        self.restarts = gauge("engine_restarts", "Times that the engine was started again.")
        self.text_restarts = gauge(
            "text_restarts", "Times that a process of a text stage was started again."
        )
        self.ready = gauge("engine_ready", "1 if the engine generates tokens.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.success = counter(
            "request_success", "Choices that ended.", (*_LABELS, "finished_reason")
        )
        self.failed = counter("request_failed", "Requests that ended with an error.")
        self.cancelled = counter("request_cancelled", "Requests whose client went away.")
        self.rejections = counter(
            "admission_rejections",
            "Requests that were not admitted, or whose schema was refused.",
            ("model", "key", "reason"),
        )
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to a token.")
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "From one token to the next.", _TOKEN_SECONDS
        )
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self.queue = histogram("request_queue_time_seconds", "From arrival to the engine.")

    def render(self) -> bytes:
        """Returns all metrics in the text format of Prometheus."""
        return bytes(generate_latest(self.registry))
