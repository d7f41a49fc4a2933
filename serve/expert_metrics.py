"""How tokens spread over the experts, for Prometheus: sums in plain lists, made into families when asked."""

# Shapes: L MoE layers, E experts.

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Sequence
from operator import add

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from ..infer.outputs import StepReport
from ..infer.recording import Recording

MOST_SERIES = 8192
"""Time series of one family; a model with more experts tells one sum a layer."""
WINDOW_S = 60.0


class ExpertMetrics:
    """What steps say of experts and of the memory's rate; a collector for a Prometheus registry.

    `observe` is on the engine's thread and takes about 20 ns an expert; all else is done for who asks.

    Attributes:
        loads_LE: assignments of each expert since the start.
    """

    def __init__(self, model_name: str, *, most_series: int = MOST_SERIES, window_s: float = WINDOW_S) -> None:
        self.model_name, self.most_series, self.window_s = model_name, most_series, window_s
        self.loads_LE: list[list[int]] = []
        self._distinct_L: list[int] = []  # of the last step
        self._visited_L: list[int] = []  # summed over the steps
        self._steps_L: list[int] = []
        self._seconds = self._least = 0.0
        # What the sums were at two times: the older is between one and two windows ago.
        self._older = self._newer = self._mark(-math.inf)
        self._lock = threading.Lock()

    def observe(self, report: StepReport, now: float | None = None) -> None:
        """Takes in one step."""
        now = time.monotonic() if now is None else now
        with self._lock:
            self._turn(now)
            if len(self.loads_LE) != len(report.loads):
                self.loads_LE = [[0] * len(row) for row in report.loads]
                self._distinct_L = [0] * len(report.loads)
                self._visited_L = [0] * len(report.loads)
                self._steps_L = [0] * len(report.loads)
            for layer, row in enumerate(report.loads):
                distinct = len(row) - row.count(0)
                if distinct:  # a step without assignments says nothing about the spread
                    self.loads_LE[layer] = list(map(add, self.loads_LE[layer], row))
                    self._distinct_L[layer] = distinct
                    self._visited_L[layer] += distinct
                    self._steps_L[layer] += 1
            if report.roofline > 0:
                self._seconds += report.seconds
                self._least += report.roofline * report.seconds

    def _mark(self, now: float) -> tuple[float, list[list[int]], float, float]:
        return now, self.loads_LE, self._seconds, self._least

    def _turn(self, now: float) -> None:
        """Moves the two times on. Rows of sums are replaced and never written, so that holding them is enough."""
        if now - self._newer[0] >= self.window_s:
            self._older = self._newer if now - self._newer[0] < 2 * self.window_s else self._mark(now)
            self._newer = self._mark(now)
            self.loads_LE = list(self.loads_LE)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known, and the registry need not ask."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The families, of one moment."""
        with self._lock:
            self._turn(time.monotonic())
            loads_LE = list(self.loads_LE)
            _, before_LE, seconds, least = self._older
            recent_LE = [
                [n - m for n, m in zip(row, before_LE[layer], strict=True)] if before_LE else row
                for layer, row in enumerate(loads_LE)
            ]
            seconds, least = self._seconds - seconds, self._least - least
            distinct = list(zip(self._distinct_L, self._visited_L, self._steps_L, strict=True))
        if seconds > 0:
            roofline = GaugeMetricFamily(
                "coterie:roofline_fraction",
                "Bytes that had to be read over seconds, as a share of the memory's measured rate, last 1-2 minutes.",
                labels=["model_name"],
            )
            roofline.add_metric([self.model_name], least / seconds)
            yield roofline
        yield self._loads(loads_LE)
        yield self._gauge(
            "expert_entropy",
            "Entropy of the assignments over the experts as a share of its most, last 1-2 minutes; 1 is balance.",
            [entropy(row) for row in recent_LE],
        )
        yield self._gauge(
            "expert_imbalance",
            "Assignments of the busiest expert over those of the mean one, last 1-2 minutes; 1 is balance.",
            [max(row) * len(row) / sum(row) if any(row) else None for row in recent_LE],
        )
        yield self._gauge(
            "distinct_experts", "Experts that the last step visited.", [last or None for last, _, _ in distinct]
        )
        steps = SummaryMetricFamily(
            "coterie:distinct_experts_per_step", "Experts visited by each step.", labels=["model_name", "layer"]
        )
        for layer, (_, visited, count) in enumerate(distinct[: self.most_series]):
            steps.add_metric([self.model_name, str(layer)], count_value=count, sum_value=visited)
        yield steps

    def _loads(self, loads_LE: Sequence[Sequence[int]]) -> Metric:
        family = CounterMetricFamily(
            "coterie:expert_load",
            "Tokens assigned to each expert; expert all: the layer's sum, where there are too many to tell each.",
            labels=["model_name", "layer", "expert"],
        )
        each = sum(map(len, loads_LE)) <= self.most_series
        for layer, row in enumerate(loads_LE[: self.most_series]):
            for expert, load in enumerate(row) if each else [("all", sum(row))]:
                family.add_metric([self.model_name, str(layer), str(expert)], load)
        return family

    def _gauge(self, name: str, about: str, values_L: Sequence[float | None]) -> Metric:
        """None: a layer without anything to tell."""
        family = GaugeMetricFamily(f"coterie:{name}", about, labels=["model_name", "layer"])
        for layer, value in enumerate(values_L[: self.most_series]):
            if value is not None:
                family.add_metric([self.model_name, str(layer)], value)
        return family


class RecordingMetrics:
    """What a recording has; a collector. Pairs and transitions of experts are too many for labels: they are in the
    file."""

    def __init__(self, model_name: str, recording: Recording) -> None:
        self._label, self._recording = [model_name], recording

    def describe(self) -> Iterable[Metric]:
        """Nothing; see `ExpertMetrics`."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The families."""
        told = self._recording
        for kind, name, about, value in (
            (CounterMetricFamily, "recorded_steps", "Steps that the recording was told of.", told.steps),
            (CounterMetricFamily, "recorded_tokens", "Tokens of these steps.", told.tokens),
            (GaugeMetricFamily, "recorded_kept_steps", "Steps that it keeps, evenly spread over all.", told.kept),
            (GaugeMetricFamily, "recorded_kept_bytes", "Memory of the steps that it keeps.", told.bytes),
            (GaugeMetricFamily, "recorded_saved_steps", "Steps told of when its file was written.", told.saved),
        ):
            family = kind(f"coterie:{name}", about, labels=["model_name"])
            family.add_metric(self._label, value)
            yield family


def entropy(loads_E: Sequence[int]) -> float | None:
    """Of the assignments, over log E: 1.0 all experts alike, 0.0 one alone. None: no assignments, or one expert."""
    total = sum(loads_E)
    if not total or len(loads_E) < 2:
        return None
    return -sum(n / total * math.log(n / total) for n in loads_E if n) / math.log(len(loads_E))
