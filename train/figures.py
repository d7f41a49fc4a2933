"""The plots of a run's report, drawn by matplotlib without a display and handed out as SVG."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Rows = list[dict[str, Any]]
Series = NDArray[np.float64]

INK, FAINT, GRID = "#23262f", "#7b808c", "#e8e6e1"
COLORS = ("#2f6db3", "#d2691e", "#3b8f6b", "#8a5fb5", "#b8405e", "#6b7a2f", "#1f98a8", "#8c6d4f")
TIMES = {
    "data": "#b9b4a7",
    "forward": "#2f6db3",
    "alltoall": "#d2691e",
    "backward": "#6aa3d9",
    "optimizer": "#3b8f6b",
}
STARVED, EVEN, CROWDED = "#1f5a96", "#faf8f3", "#c2461f"
POINTS = 1500
COLUMNS = 240
WIDTH = 10.4
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Run:
    """What the report knows of one run; `rows` is not empty and in the order of the steps."""

    name: str
    rows: Rows
    config: dict[str, Any]
    environment: dict[str, Any]
    baselines: dict[str, float]

    def series(self, *keys: str) -> tuple[Series, Series]:
        """(tokens, values) of the rows that have a finite number under the nested keys; steps where tokens lack."""
        pairs = []
        for row in self.rows:
            value: Any = row
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float) and math.isfinite(value):
                pairs.append((self.position(row), float(value)))
        points = np.array(pairs, np.float64).reshape(-1, 2)
        return points[:, 0], points[:, 1]

    @functools.cached_property
    def has_loads(self) -> bool:
        return any(row.get("loads") for row in self.rows)

    def position(self, row: dict[str, Any]) -> float:
        return float(row["tokens"] if self.has_tokens else row["step"])

    @functools.cached_property
    def has_tokens(self) -> bool:
        return all(isinstance(row.get("tokens"), int | float) for row in self.rows)


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Any, NDArray[Any]]:
    """A figure and its (rows, columns) axes. Figure alone, without pyplot: no global state, no display."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError('reports need matplotlib: pip install "coterie[train]"') from None
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    axes = cast("NDArray[Any]", figure.subplots(rows, columns, squeeze=False, **options))
    for axis in axes.flat:
        _plain(axis)
    return figure, axes


def _plain(axis: Any) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#c9c6bf")
    axis.tick_params(length=0, labelsize=9, labelcolor=FAINT)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def as_svg(figure: Any) -> str:
    """The figure's text, with the page's fonts."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "coterie"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(r"'DejaVu Sans'[^;\"]*?sans-serif", FONTS.replace('"', "'"), out.getvalue())


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10.5, color=INK, pad=7)


def _tokens_axis(axis: Any, run: Run, label: bool = True) -> None:
    axis.xaxis.set_major_formatter(lambda value, _: short(value))
    axis.margins(x=0.01)
    if label:
        axis.set_xlabel("tokens" if run.has_tokens else "steps", fontsize=9, color=FAINT)


def short(value: float) -> str:
    """1500000 -> 1.5M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def smooth(values: Series) -> Series:
    """A centred running mean over a fiftieth of the run; shorter at the ends."""
    half = len(values) // 100
    if half == 0:
        return values
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def thin(x: Series, y: Series, reduce: Callable[..., Any] = np.mean) -> tuple[Series, Series]:
    """At most POINTS points, each the mean of its neighbours: an SVG with every step of a long run is heavy."""
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([reduce(y[p]) for p in parts])


def loss_figure(runs: Sequence[Run]) -> str:
    """Training loss (faint: every step; strong: running mean) and validation loss (dots) of one or several runs."""
    figure, axes = new_figure(WIDTH, 4.1)
    axis, top, lines = axes[0, 0], [], []
    for run, color in zip(runs, _cycle(len(runs)), strict=True):
        x, y = run.series("loss")
        name = run.name.replace("$", r"\$") + ": " if len(runs) > 1 else ""  # between dollars is mathematics
        if len(x):
            axis.plot(*thin(x, y), color=color, alpha=0.22, linewidth=0.8)
            axis.plot(*thin(x, smooth(y)), color=color, linewidth=1.8, label=f"{name}training")
            lines.append(y)
            # The first steps fall from ln(vocabulary): with them in view, a long run would be a flat line.
            top.append(smooth(y)[len(y) // 50] if len(y) > 100 else y.max())
        x, y = run.series("valid_loss")
        if len(x):
            style = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "markeredgewidth": 1.6}
            axis.plot(x, y, color=color, linewidth=1.2, linestyle=(0, (4, 2)), label=f"{name}validation", **style)
            lines.append(y)
    known = {k: v for run in runs for k, v in run.baselines.items()}
    for label, value in known.items():
        axis.axhline(value, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)))
        axis.annotate(
            label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8.5, color=FAINT
        )
    if lines:
        low = min([*(y.min() for y in lines), *known.values()])
        high = max([*top, *known.values()]) if top else max(y.max() for y in lines)
        pad = 0.05 * (high - low) or 0.1
        axis.set_ylim(low - pad, high + pad)
        columns = min(4, 2 * len(runs))
        axis.legend(
            frameon=False, fontsize=9, labelcolor=INK, loc="lower right", bbox_to_anchor=(1, 1), ncols=columns
        )
    _tokens_axis(axis, runs[0])
    axis.set_ylabel("nats per token", fontsize=9, color=FAINT)
    return as_svg(figure)


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def lines_figure(run: Run, panels: dict[str, tuple[str, ...]], columns: int = 2) -> str:
    """Small plots side by side: {title: keys of the value}; those without any value are left out."""
    found = {title: run.series(*keys) for title, keys in panels.items()}
    found = {title: points for title, points in found.items() if len(points[0])}
    if not found:
        return ""
    columns = min(columns, len(found))
    rows = -(-len(found) // columns)
    figure, axes = new_figure(WIDTH, 2.35 * rows, rows, columns)
    for axis, (title, (x, y)) in zip(axes.flat, found.items(), strict=False):
        axis.plot(*thin(x, y), color=COLORS[0], alpha=0.25, linewidth=0.8)
        low, high = np.quantile(y, 0.005), np.quantile(y, 0.995)
        if len(y) > 50 and y.max() > high + 3 * (high - low):  # one spike must not flatten all the rest
            axis.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))
            y = np.minimum(y, high)
        axis.plot(*thin(x, smooth(y)), color=COLORS[0], linewidth=1.7)
        axis.yaxis.set_major_formatter(lambda value, _: short(value))
        _title(axis, title)
        _tokens_axis(axis, run)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    return as_svg(figure)


def load_grid(run: Run) -> dict[int, tuple[Series, float, float]]:
    """{layer: (load_EX relative to an even load, first position, last position)}; X at most COLUMNS time bins."""
    by_layer: dict[int, list[tuple[float, Series]]] = {}
    for row in run.rows:
        loads = row.get("loads") or []
        for layer, load in zip(row.get("layers") or range(len(loads)), loads, strict=False):
            load_E = np.asarray(load, np.float64)  # null becomes NaN
            if load_E.size and np.isfinite(load_E).all():
                by_layer.setdefault(layer, []).append((run.position(row), load_E))
    grids = {}
    for layer, points in sorted(by_layer.items()):
        count = len(points[-1][1])
        points = [p for p in points if len(p[1]) == count]
        load_TE = np.stack([load_E for _, load_E in points])
        load_TE = load_TE / np.maximum(load_TE.mean(axis=1, keepdims=True), 1e-30)
        bins = np.array_split(load_TE, min(COLUMNS, len(load_TE)))
        grids[layer] = (np.stack([b.mean(axis=0) for b in bins], axis=1), points[0][0], points[-1][0])
    return grids


def loads_figure(run: Run) -> str:
    """One heat map a MoE layer: experts upwards, time to the right, load relative to an even one."""
    grids = load_grid(run)
    if not grids:
        return ""
    columns = min(len(grids), 2 if len(grids) in (2, 4) else 3 if len(grids) <= 9 else 4 if len(grids) <= 32 else 6)
    rows = -(-len(grids) // columns)
    height = 1.75 if rows <= 3 else 1.3 if rows <= 8 else 1.0
    figure, axes = new_figure(WIDTH, height * rows + 0.75, rows, columns)
    image = None
    for index, (axis, (layer, (load_EX, start, end))) in enumerate(zip(axes.flat, grids.items(), strict=False)):
        experts = len(load_EX)
        image = heat(axis, load_EX, (start, max(end, start + 1), -0.5, experts - 0.5))
        axis.set_yticks([0, experts - 1] if experts > 1 else [0])
        axis.set_title(f"layer {layer}, {experts} experts", loc="left", fontsize=9, color=INK, pad=4)
        last = index + columns >= len(grids)
        _tokens_axis(axis, run, label=last)
        axis.locator_params(axis="x", nbins=4)
        if not last:
            axis.set_xticklabels([])
    for axis in axes.flat[len(grids) :]:
        axis.set_visible(False)
    heat_bar(figure, image, axes)
    return as_svg(figure)


def heat(axis: Any, load_YX: Series, extent: tuple[float, float, float, float]) -> Any:
    """Draws loads relative to an even one, 1, as a heat map with the first row at the bottom; returns the image."""
    from matplotlib.colors import LinearSegmentedColormap

    image = axis.imshow(
        np.log2(np.maximum(load_YX, 1e-6)),
        aspect="auto",
        origin="lower",
        cmap=LinearSegmentedColormap.from_list("load", [STARVED, EVEN, CROWDED]),
        vmin=-2,
        vmax=2,
        interpolation="nearest",
        extent=extent,
    )
    axis.grid(False)
    axis.spines["bottom"].set_visible(False)
    return image


def heat_bar(figure: Any, image: Any, axes: NDArray[Any]) -> None:
    """What the colours of `heat` mean, above all axes."""
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.5, aspect=50, pad=0.03, anchor=(0.0, 0.5))
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["a quarter and less", "half", "even", "twice", "4 times and more"])
    bar.ax.tick_params(length=0, labelsize=9, labelcolor=FAINT)
    bar.outline.set_visible(False)


def time_shares(run: Run) -> dict[str, float]:
    """Median seconds of each span of a step."""
    medians = {name: run.series("time", name)[1] for name in TIMES}
    return {name: float(np.median(values)) for name, values in medians.items() if len(values)}


def times_figure(run: Run) -> str:
    """Where a step's time goes, over the run, stacked; one bar of medians below."""
    spans = [name for name in TIMES if len(run.series("time", name)[0])]
    if not spans:
        return ""
    rows = [row for row in run.rows if isinstance(row.get("time"), dict)]
    x = np.array([run.position(row) for row in rows])
    stack = np.array([[float(row["time"].get(name) or 0.0) for row in rows] for name in spans]) * 1e3
    figure, axes = new_figure(WIDTH, 2.9)
    axis = axes[0, 0]
    thinned = [thin(x, smooth(values), np.median) for values in stack]
    total = smooth(np.asarray(stack.sum(axis=0)))
    colors = [TIMES[name] for name in spans]
    axis.stackplot(thinned[0][0], [y for _, y in thinned], colors=colors, labels=spans, linewidth=0)
    axis.set_ylim(0, 1.12 * float(np.quantile(total, 0.98)) or 1.0)
    axis.set_ylabel("ms per step", fontsize=9, color=FAINT)
    _tokens_axis(axis, run)
    axis.margins(x=0)
    return as_svg(figure)
