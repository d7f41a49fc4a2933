"""The page of a plan: how recorded steps load copies and ranks with experts in order and as planned, and the gain.

Planned on the first half of the steps and shown for the second, as `coterie bench placement` judges.
"""

# Shapes: S steps, L layers, R ranks, E experts, C copies of a layer.

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..infer.placement import Cluster
from ..infer.replicas import concentrate
from ..infer.routes import Routes
from ..train.figures import FAINT, INK, WIDTH, as_svg, heat, heat_bar, new_figure
from ..train.report import picture, section, write_page
from .placement_peers import dealt
from .rows import Row

TOLD = {
    "imbalance": "fullest rank's tokens / mean",
    "activated": "most experts that a rank computes",
    "crossings": "nodes that a token is sent to",
    "following": "the same, going on at the first choice's node",
}
AFTER = "coterie"


class Part:
    """Steps of one kind, and what placements do with them.

    Attributes:
        name: prefill or decode.
        routes: the judged steps.
        before, after: copies (L, R, E) that each rank holds.
        numbers: by contender and metric.
    """

    def __init__(self, name: str, routes: Routes, before: np.ndarray, after: np.ndarray, rows: Sequence[Row]) -> None:
        self.name, self.routes, self.before, self.after = name, routes, before, after
        self.numbers = {(row.impl, row.metric): row.value for row in rows}

    def shares(self, planned: bool) -> np.ndarray:
        """The work of each copy (L, R, E), of a rank's mean: tokens for prefill, experts computed for decode."""
        copies_LRE = self.after if planned else self.before
        out_LRE = np.zeros(copies_LRE.shape)
        for layer, copies_RE in enumerate(copies_LRE):
            loads_SE = self.routes.loads_SLE[:, layer]
            loads_SE = loads_SE[loads_SE.any(1)]
            if self.name == "prefill":
                out_LRE[layer] = loads_SE.sum(0) * copies_RE / copies_RE.sum(0).clip(1)
            elif planned:
                rank_SE = concentrate(loads_SE, copies_RE > 0)
                out_LRE[layer] = (rank_SE[:, None] == np.arange(len(copies_RE))[:, None]).sum(0)
            else:
                out_LRE[layer] = [read_SE.sum(0) for read_SE in dealt(loads_SE, copies_RE)]
        return out_LRE / out_LRE.sum((1, 2), keepdims=True).clip(1e-9) * copies_LRE.shape[1]


def write(path: Path, name: str, cluster: Cluster, parts: Sequence[Part]) -> None:
    """The page of a recording."""
    shape = f"{cluster.nodes} nodes of {cluster.ranks} ranks with {cluster.slots} slots a layer"
    experts = ", ".join(str(n) for n in sorted(set(parts[0].routes.experts)))
    layers = len(parts[0].routes.experts)
    body = f'<h1>{html.escape(name)}</h1><p class="sub">{layers} layers of {experts} experts on {shape}</p>'
    write_page(path, f"{name} placed", body + "".join(map(_part, parts)), "coterie bench placement --html")


def _part(part: Part) -> str:
    judged = "imbalance" if part.name == "prefill" else "activated"
    tiles = ""
    for metric in (judged, "crossings"):
        before, eplb, after = (part.numbers[who, metric] for who in ("round robin", "eplb", AFTER))
        tiles += _tile(f"{before:.3g} → {after:.3g}", TOLD[metric])
        tiles += _tile(f"{after / before - 1:+.1%}", f"predicted, {metric}")
        tiles += _tile(f"{after / eplb - 1:+.1%}", f"beside EPLB, {metric}")
    work = "tokens" if part.name == "prefill" else "experts that are computed"
    text = (
        f"{len(part.routes)} steps that the plan has not seen. Above experts in order, below as planned. "
        f"Left: {work} of each copy, ranks from left to right, relative to an even share. Right: of each rank."
    )
    figure = picture(_figure(part), f"heat maps of {work} by layer, copy and rank, before and after the plan")
    return f'<h2>{part.name}</h2><div class="tiles">{tiles}</div>' + section("Load", text, figure) + _table(part)


def _tile(value: str, about: str) -> str:
    return f'<div class="tile"><b>{value}</b><span>{html.escape(about)}</span></div>'


def _table(part: Part) -> str:
    impls = list(dict.fromkeys(impl for impl, _ in part.numbers))
    head = "".join(f"<th>{html.escape(impl)}</th>" for impl in impls)
    rows = "".join(
        f"<tr><td>{about}</td>" + "".join(f"<td>{part.numbers[impl, metric]:.4g}</td>" for impl in impls) + "</tr>"
        for metric, about in TOLD.items()
    )
    table = f'<div class="scroll"><table class="wide"><tr><th></th>{head}</tr>{rows}</table></div>'
    return section("Beside others", "Means over steps and layers, at equal copies.", table)


def _figure(part: Part) -> str:
    figure, axes = new_figure(WIDTH, 2 * (1.1 + 0.07 * len(part.before)), 2, 2, width_ratios=(3, 1))
    image = None
    for row, (planned, name) in enumerate(((False, "experts in order"), (True, "as planned"))):
        shares_LRE = part.shares(planned)
        copies_LRE = part.after if planned else part.before
        by_copy_LC, ends = _by_copy(shares_LRE, copies_LRE)
        for axis, load_LX, of in ((axes[row, 0], by_copy_LC, "copies"), (axes[row, 1], shares_LRE.sum(2), "ranks")):
            L, X = load_LX.shape
            image = heat(axis, load_LX, (0, X, -0.5, L - 0.5))
            axis.set_title(f"{name}: {of}", loc="left", fontsize=9, color=INK, pad=4)
            axis.set_yticks([0, L - 1] if L > 1 else [0])
            axis.set_ylabel("layer", fontsize=9, color=FAINT)
            axis.set_xticks([])
            for end in ends if of == "copies" else ():
                axis.axvline(end, color="white", linewidth=0.8)
    heat_bar(figure, image, axes)
    return as_svg(figure)


def _by_copy(shares_LRE: np.ndarray, copies_LRE: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The work of each copy relative to the mean copy, ranks side by side (L, C), and where a rank ends. Layers with
    fewer copies on a rank have empty places, NaN."""
    L, R, _ = shares_LRE.shape
    room_R = copies_LRE.sum(2).max(0)
    ends = np.cumsum(room_R)
    out_LC = np.full((L, ends[-1]), np.nan)
    for layer in range(L):
        even = shares_LRE[layer].sum() / copies_LRE[layer].sum()
        for rank in range(R):
            held_E = np.flatnonzero(copies_LRE[layer, rank])
            each = shares_LRE[layer, rank, held_E] / copies_LRE[layer, rank, held_E] / even
            values = np.repeat(each, copies_LRE[layer, rank, held_E])
            start = ends[rank] - room_R[rank]
            out_LC[layer, start : start + len(values)] = values
    return out_LC, ends[:-1].tolist()
