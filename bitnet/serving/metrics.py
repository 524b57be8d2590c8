"""What Prometheus reads at /metrics: counters and histograms of one server, a registry of its own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class ModelMetrics:
    """The numbers of one model."""

    def __init__(self, metrics: "Metrics", model: str) -> None:
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.cached_tokens = metrics.cached_tokens.labels(model)
        self.new_tokens = metrics.new_tokens.labels(model)
        self.drafts = metrics.drafts.labels(model)
        self.draft_tokens = metrics.draft_tokens.labels(model)
        self.accepted_tokens = metrics.accepted_tokens.labels(model)
        self.cancelled = metrics.cancelled.labels(model)
        self.queue_seconds = metrics.queue_seconds.labels(model)
        self.first_token_seconds = metrics.first_token_seconds.labels(model)
        self.token_seconds = metrics.token_seconds.labels(model)
        self.pass_seconds = metrics.pass_seconds.labels(model)
        self.pass_rows = metrics.pass_rows.labels(model)


class Metrics:
    """The numbers of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ("model",)) -> Counter:
            return Counter(f"bitnet_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"bitnet_{name}", text, ("model",), buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Answered requests", ("path", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that the model has read")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts that were known from earlier texts")
        self.new_tokens = counter("generated_tokens", "Tokens that the model has written")
        self.drafts = counter("drafts", "Drafts of a text's next tokens (prompt look-up) that the model has read")
        self.draft_tokens = counter("draft_tokens", "Tokens of those drafts")
        self.accepted_tokens = counter("accepted_draft_tokens", "Those of them that the text had")
        self.cancelled = counter("cancelled", "Requests whose client left before the end")
        self.queue_seconds = histogram("queue_seconds", "From a request's arrival to its first pass")
        self.first_token_seconds = histogram("first_token_seconds", "From a request's arrival to its first token")
        self.token_seconds = histogram("token_seconds", "Between two tokens of a text")
        self.pass_seconds = histogram("pass_seconds", "One pass of the model")
        self.pass_rows = histogram("pass_rows", "Texts in one pass", ROWS)
        self._gauges = {
            name: Gauge(f"bitnet_{name}", text, ("model",), registry=self.registry)
            for name, text in (
                ("running", "Texts that are read or written now"),
                ("waiting", "Requests that wait"),
                ("cache_free_tokens", "Tokens for which the cache has room"),
                ("cache_beginnings", "Finished texts that are kept as beginnings of others"),
            )
        }

    def watch(self, model: str, counts: Callable[[], tuple[int, int, int, int]]) -> None:
        """Read a model's gauges from `counts` whenever they are asked for."""
        for index, gauge in enumerate(self._gauges.values()):
            gauge.labels(model).set_function(lambda index=index: counts()[index])  # type: ignore[misc]

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
