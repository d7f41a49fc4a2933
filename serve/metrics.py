"""What a server tells Prometheus: vLLM's names where vLLM has them, so that its dashboards work, and coterie's own.

Requests are counted once each, whatever their n; tokens of all their choices. What a client was told is counted when
it is told, hence at the end of an answer its numbers are there. Names and buckets: vLLM's docs, "Metrics".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from ..infer.outputs import Delta, StepReport
from ..infer.request import FinishReason

if TYPE_CHECKING:
    from ..infer.engine import Engine
    from ..infer.recording import Recording

MOST_RECORDS = 1 << 16
"""Requests under way that are remembered; the oldest gives way, so that one whose end is never told costs nothing."""
REASONS = get_args(FinishReason)
CODES = ("400", "401", "403", "404", "405", "408", "411", "413", "415", "422", "429", "431", "500", "503", "504")

_FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_WHOLE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
_STEP = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_GAUGES = {
    "vllm:num_requests_running": "Sequences that hold blocks.",
    "vllm:num_requests_waiting": "Sequences in the queue.",
    "vllm:kv_cache_usage_perc": "Blocks of keys and values in use; 1 is all.",
    "coterie:token_budget": "Tokens that a step may compute.",
}
_COUNTERS = {
    "vllm:prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "vllm:prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "vllm:num_preemptions": "Sequences that gave their blocks back and computed again.",
    "vllm:prompt_tokens": "Tokens of prompts that were computed or found in the prefix cache.",
    "vllm:prompt_tokens_cached": "Tokens of prompts that were found in the prefix cache.",
    "vllm:generation_tokens": "Tokens of answers.",
    "vllm:spec_decode_num_draft_tokens": "Guesses that were checked.",
    "vllm:spec_decode_num_accepted_tokens": "Guesses that were right.",
}
_HISTOGRAMS = {
    "vllm:iteration_tokens_total": ("Tokens that a step computed.", _TOKENS),
    "vllm:time_to_first_token_seconds": ("From a request's arrival to its first token.", _FIRST),
    "vllm:inter_token_latency_seconds": ("Between a choice's tokens, one for each delivery.", _BETWEEN),
    "vllm:request_time_per_output_token_seconds": ("Of a choice, over its tokens after the first.", _BETWEEN),
    "vllm:e2e_request_latency_seconds": ("From a request's arrival to its end.", _WHOLE),
    "vllm:request_queue_time_seconds": ("From a request's arrival to its first blocks.", _WHOLE),
    "vllm:request_prefill_time_seconds": ("From a request's first blocks to its first token.", _WHOLE),
    "vllm:request_decode_time_seconds": ("From a request's first token to its last.", _WHOLE),
    "vllm:request_inference_time_seconds": ("From a request's first blocks to its last token.", _WHOLE),
    "coterie:step_seconds": ("Of one step of the engine.", _STEP),
}
# The engine counts these itself: its name -> ours.
_ENGINE_COUNTS = {"prefix_queries": "vllm:prefix_cache_queries", "prefix_hits": "vllm:prefix_cache_hits"}


@dataclass(slots=True)
class _Choice:
    first: float
    last: float
    tokens: int


@dataclass(slots=True)
class _Record:
    """A request under way."""

    arrival: float
    prompt_tokens: int
    queued: float = 0.0
    choices: dict[int, _Choice] = field(default_factory=dict)


class Metrics:
    """The numbers of one server, in a registry of its own: servers in one process do not disturb each other.

    Methods may be called from any thread. Times are `time.monotonic`'s seconds.

    Raises:
        RuntimeError: prometheus-client is not installed.
    """

    def __init__(self, engine: Engine, recording: Recording | None = None) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise RuntimeError("metrics need prometheus-client: pip install 'coterie[serve]'") from error
        from .expert_metrics import ExpertMetrics, RecordingMetrics

        self._engine = engine
        self._registry = registry = prometheus.CollectorRegistry()
        self._label = label = {"model_name": engine.name}
        self._lock = threading.Lock()
        self._scraping = threading.Lock()  # another one: a sink may call `delta` while its engine holds its own lock
        self._records: dict[str, _Record] = {}
        self._told = dict.fromkeys(_ENGINE_COUNTS, 0.0)
        self._blocks = (0, 1)

        self._value: dict[str, Any] = {
            name: kind(name, about, [*label], registry=registry).labels(**label)
            for kind, family in ((prometheus.Gauge, _GAUGES), (prometheus.Counter, _COUNTERS))
            for name, about in family.items()
        }
        self._observed = {
            name: prometheus.Histogram(name, about, [*label], buckets=buckets, registry=registry).labels(**label)
            for name, (about, buckets) in _HISTOGRAMS.items()
        }
        self._lengths(prometheus)
        self._finished = self._family(
            prometheus.Counter, "vllm:request_success", "Requests that ended.", "finished_reason", REASONS
        )
        self._rejected = self._family(
            prometheus.Counter, "coterie:requests_rejected", "Requests refused.", "code", (*CODES, "other")
        )
        self._info(prometheus)
        self._experts = ExpertMetrics(engine.name)
        registry.register(self._experts)
        if recording is not None:
            registry.register(RecordingMetrics(engine.name, recording))
        prometheus.ProcessCollector(registry=registry)
        self._unwatch = engine.watch(self._step)

    def _family(self, kind: type, name: str, about: str, label: str, values: Iterable[str]) -> dict[str, Any]:
        """One series for each known value, at 0 from the start: a rate then misses no first event."""
        family = kind(name, about, [*self._label, label], registry=self._registry)
        return {value: family.labels(**self._label, **{label: value}) for value in values}

    def _lengths(self, prometheus: Any) -> None:
        most = self._engine.max_model_len
        buckets = [m * 10**e for e in range(len(str(most))) for m in (1, 2, 5) if m * 10**e <= most]
        for name, about in (
            ("vllm:request_prompt_tokens", "Tokens of a request's prompt."),
            ("vllm:request_generation_tokens", "Tokens of a request's choices together."),
        ):
            family = prometheus.Histogram(name, about, [*self._label], buckets=buckets, registry=self._registry)
            self._observed[name] = family.labels(**self._label)

    def _info(self, prometheus: Any) -> None:
        report = self._engine.report()
        labels = {
            "block_size": str(report.get("block_size", "")),
            "num_gpu_blocks": str(report.get("blocks", "")),
            "cache_dtype": str(report.get("kv_dtype", "")),
            "policy": str(report.get("policy", "")),
            "device": str(report.get("device", "")),
        }
        about = "The engine's settings, always 1."
        family = prometheus.Gauge("vllm:cache_config_info", about, [*self._label, *labels], registry=self._registry)
        family.labels(**self._label, **labels).set(1)

    def begin(self, id: str, prompt_tokens: int, now: float | None = None) -> None:
        """A request is given to the engine: before, as its first tokens may come at once."""
        with self._lock:
            while len(self._records) >= MOST_RECORDS:
                del self._records[next(iter(self._records))]
            self._records[id] = _Record(time.monotonic() if now is None else now, prompt_tokens)

    def delta(self, id: str, delta: Delta, now: float) -> None:
        """Something of it came; after its end nothing is counted."""
        tokens = len(delta.tokens)
        with self._lock:
            record = self._records.get(id)
            if record is None or not tokens:
                return
            if not record.choices:
                self._begun(record, delta, now)
            choice = record.choices.get(delta.key[1])
            if choice is None:
                record.choices[delta.key[1]] = _Choice(now, now, tokens)
            else:
                self._observed["vllm:inter_token_latency_seconds"].observe(now - choice.last)
                choice.last = now
                choice.tokens += tokens
        self._value["vllm:generation_tokens"].inc(tokens)

    def _begun(self, record: _Record, delta: Delta, now: float) -> None:
        """Its first token is there."""
        record.queued = delta.queued
        first = now - record.arrival
        self._observed["vllm:time_to_first_token_seconds"].observe(first)
        self._observed["vllm:request_queue_time_seconds"].observe(record.queued)
        self._observed["vllm:request_prefill_time_seconds"].observe(max(0.0, first - record.queued))
        self._value["vllm:prompt_tokens"].inc(record.prompt_tokens)
        self._value["vllm:prompt_tokens_cached"].inc(delta.cached)

    def end(self, id: str, finish: str, now: float | None = None) -> None:
        """It ended, for a reason that the engine gives or "abort"; a second end is not counted."""
        with self._lock:
            record = self._records.pop(id, None)
        if record is None:
            return
        now = time.monotonic() if now is None else now
        self._finished[finish if finish in self._finished else "error"].inc()
        seen = self._observed
        seen["vllm:e2e_request_latency_seconds"].observe(now - record.arrival)
        seen["vllm:request_prompt_tokens"].observe(record.prompt_tokens)
        choices = record.choices.values()
        seen["vllm:request_generation_tokens"].observe(sum(choice.tokens for choice in choices))
        for choice in choices:
            if choice.tokens > 1:
                each = (choice.last - choice.first) / (choice.tokens - 1)
                seen["vllm:request_time_per_output_token_seconds"].observe(each)
        if choices:
            first, last = min(choice.first for choice in choices), max(choice.last for choice in choices)
            seen["vllm:request_decode_time_seconds"].observe(last - first)
            seen["vllm:request_inference_time_seconds"].observe(max(0.0, last - record.arrival - record.queued))

    def forget(self, id: str) -> None:
        """The engine did not take it after all: it is counted nowhere but by `rejected`."""
        with self._lock:
            self._records.pop(id, None)

    def rejected(self, code: int) -> None:
        """A request was refused with this HTTP status."""
        self._rejected[str(code) if str(code) in CODES else "other"].inc()

    def _step(self, report: StepReport) -> None:
        """After each step, on the engine's thread."""
        value, seen = self._value, self._observed
        value["vllm:num_requests_running"].set(report.running)
        value["vllm:num_requests_waiting"].set(report.waiting)
        self._blocks = report.blocks_used, report.blocks
        if report.tokens:
            seen["vllm:iteration_tokens_total"].observe(report.tokens)
        seen["coterie:step_seconds"].observe(report.seconds)
        for name, count in (
            ("vllm:num_preemptions", report.preempted),
            ("vllm:spec_decode_num_draft_tokens", report.drafted),
            ("vllm:spec_decode_num_accepted_tokens", report.accepted),
        ):
            if count:
                value[name].inc(count)
        self._experts.observe(report)

    def _refresh(self) -> None:
        """What only the engine knows. An abort between steps is in no report, hence the look at `idle`."""
        report, value = self._engine.report(), self._value
        if self._engine.idle:
            value["vllm:num_requests_running"].set(0)
            value["vllm:num_requests_waiting"].set(0)
            self._blocks = 0, self._blocks[1]
        used = _number(report.get("blocks_used"), self._blocks[0])
        value["vllm:kv_cache_usage_perc"].set(used / max(1.0, _number(report.get("blocks"), self._blocks[1])))
        value["coterie:token_budget"].set(_number(report.get("budget"), 0))
        for theirs, ours in _ENGINE_COUNTS.items():
            count = _number(report.get(theirs), 0)
            value[ours].inc(max(0.0, count - self._told[theirs]))
            self._told[theirs] = count

    def render(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and the content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        with self._scraping:
            self._refresh()
        return generate_latest(_WithoutBirthdays(self._registry)), CONTENT_TYPE_LATEST  # pyright: ignore[reportArgumentType]

    def close(self) -> None:
        """Watches the engine no longer."""
        self._unwatch()


class _WithoutBirthdays:
    """A registry without the time at which each series was made: half of the lines, and nobody's question."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Any]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _number(value: float | int | str | None, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise
