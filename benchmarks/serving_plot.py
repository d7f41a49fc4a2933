"""Latency over throughput, from the rows of `coterie bench serve`.

Each point is one run: its own throughput and its own latency, joined in the order of the load. Neither axis is ever
sorted by itself, and nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .rows import Row

PANELS = (
    ("ttft_p50", "time to first token, P50, ms"),
    ("ttft_p95", "time to first token, P95, ms"),
    ("itl_p50", "gap between tokens, P50, ms"),
    ("itl_p99", "gap between tokens, P99, ms"),
    ("e2e_p50", "whole request, P50, ms"),
    ("effective_2", "share of requests that read well at 2 tok/s"),
)
Point = tuple[float, float, str]
"""Throughput, latency, and the load that gave both."""


def curves(rows: Sequence[Row], metric: str) -> dict[tuple[str, str], list[Point]]:
    """The measured pairs by (impl, closed or the arrival process), from the lightest load to the heaviest."""
    by_run: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.bench == "serve":
            by_run.setdefault((row.impl, row.case), {})[row.metric] = row.value
    found: dict[tuple[str, str], list[tuple[float, Point]]] = {}
    for (impl, case), metrics in by_run.items():
        if metric in metrics and metrics.get("ok"):
            kind, load = case.rsplit(" ", 1)
            point = (metrics["out_tok_s"], metrics[metric], load)
            found.setdefault((impl, kind), []).append((float(load.partition("=")[2]), point))
    return {key: [point for _, point in sorted(points)] for key, points in found.items()}


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Writes one PNG with a panel for each metric. ModuleNotFoundError: matplotlib is not there."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--png needs matplotlib: pip install 'coterie[train]'") from None

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (metric, title) in enumerate(PANELS, 1):
        axes = figure.add_subplot(2, 3, place)
        impls = list(dict.fromkeys(row.impl for row in rows))
        for (impl, kind), points in curves(rows, metric).items():
            color, line = f"C{impls.index(impl) % 10}", "-" if kind == "closed" else "--"
            xs, ys, _ = zip(*points, strict=True)
            axes.plot(xs, ys, marker="o", color=color, linestyle=line, label=f"{impl}, {kind}")
            for x, y, load in points:
                axes.annotate(load, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set(xlabel="completed tok/s", title=title)
        if metric.startswith("effective"):
            axes.set_ylim(-0.03, 1.03)
        elif axes.lines:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:.3g}")
            axes.tick_params(axis="y", which="both", labelsize=7)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(Path(path), dpi=120)
