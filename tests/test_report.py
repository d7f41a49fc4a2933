"""The report: complete, self-contained, and patient with runs that are live, cut, resumed or sparse."""

import base64
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coterie.train.config import TrainConfig, to_dict
from coterie.train.figures import COLUMNS, Run, load_grid, short, smooth, thin
from coterie.train.report import report


def _row(step: int, layers: tuple[int, ...] = (1, 3), **more: Any) -> dict[str, Any]:
    loads = [[1 / 8] * 8, [0.7, *[0.02] * 15]][: len(layers)]
    times = {"data": 0.001, "forward": 0.2, "alltoall": 0.05, "backward": 0.4, "optimizer": 0.03}
    row = {"step": step, "tokens": step * 512, "loss": 5 - step / 100, "lr": 1e-3, "grad_norm": 1.5, "mfu": 0.25}
    row |= {"tokens_per_s": 1000.0, "max_mean": 11.2, "drop": 0.03, "aux": 1.1, "z": 2.0, "entropy": 0.9}
    return row | {"loads": loads, "layers": list(layers), "time": times, "skipped": 0} | more


def _write(folder: Path, rows: list[dict[str, Any]], tail: str = "", **files: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def _images(page: str) -> list[str]:
    """Every image of the page, each checked to be well-formed SVG."""
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    texts = [base64.b64decode(image).decode() for image in images]
    for text in texts:
        assert ET.fromstring(text).tag.endswith("svg")
    return texts


def test_a_full_run_has_every_part_and_needs_no_network(tmp_path: Path) -> None:
    sent = {"sent": {"self_bytes": 9, "intra_bytes": 0, "inter_bytes": 3 << 20}}
    rows = [_row(s, **({"valid_loss": 4.5} if s % 20 == 0 else {}), **sent) for s in range(1, 61)]
    run = _write(
        tmp_path / "my run",
        rows,
        config=to_dict(TrainConfig(seed=77)),
        environment={"world": 2, "commit": "abcdef0123456789", "packages": {"torch": "9.9"}},
        baselines={"bigram": 4.4},
    )
    path = report(run)
    assert path == run / "report.html"
    page = path.read_text()
    for word in (
        "my run",
        "Expert load",
        "Step time",
        "Configuration",
        "Environment",
        "abcdef0123",
        "2 ranks",
        "9.9",
    ):
        assert word in page
    assert "sent to other nodes" in page
    assert "3.0 MiB a step" in page
    assert "within the node" not in page, "nothing was sent there"
    assert "<td>77</td>" in page
    assert "<td>1</td>" in page, "a one is not a yes"
    outside = re.sub(r'src="data:[^"]+"', "", page)
    assert not re.search(r"https?://|<script|<link|@import|url\(", outside)
    loss, optimizer, loads, routing, times, speed = _images(page)
    assert "validation" in loss
    assert "bigram" in loss
    assert "Learning rate" in optimizer
    assert "Gradient norm" in optimizer
    assert "layer 1, 8 experts" in loads
    assert "layer 3, 16 experts" in loads
    assert loads.count("<image") == 3, "two heat maps and their scale"
    assert "Share of assignments dropped" in routing
    assert "ms per step" in times
    assert "Tokens per second" in speed
    for tile in ("4.500</b><span>validation loss", "11.20</b><span>max / mean load", "3.0%</b><span>dropped"):
        assert tile in page
    assert "all-to-all <small>50 ms, 7%</small>" in page
    assert not list(run.glob(".*")), "no draft is left"


def test_sparse_live_and_resumed_runs(tmp_path: Path) -> None:
    sparse = _write(tmp_path / "sparse", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}])
    page = report(sparse).read_text()
    assert len(_images(page)) == 1
    assert "Expert load" not in page
    rows = [_row(1), _row(2, loss=9.0), _row(2, loss=2.0), _row(3, loss=2.0, time=None, lr=None)]
    live = _write(tmp_path / "live", rows, tail='{"step": 4, "lo')
    page = report(live, output=tmp_path / "other.html").read_text()
    assert "3</b><span>steps" in page
    one = _write(tmp_path / "one", [_row(1, loads=[[1.0], [None, 0.5]])])
    assert "layer 1, 1 experts" in "".join(_images(report(one).read_text()))
    dense = _write(tmp_path / "dense", [_row(s, layers=()) for s in range(1, 4)])
    assert "Routing" not in report(dense).read_text()


def test_a_later_row_of_a_step_wins(tmp_path: Path) -> None:
    run = _write(tmp_path / "r", [_row(1, loss=4.0), _row(2, loss=9.0), _row(1, loss=4.0), _row(2, loss=2.0)])
    assert "2.000</b><span>training loss" in report(run).read_text()


def test_several_runs_are_compared(tmp_path: Path) -> None:
    a = _write(tmp_path / "a" / "$^^$", [_row(s) for s in range(1, 30)])
    b = _write(tmp_path / "b" / "$^^$", [_row(s, layers=(), valid_loss=3.25) for s in range(1, 30)])
    page = report(a, b).read_text()
    first = _images(page)[0]
    for name in ("a/$^^$", "b/$^^$"):
        assert f"{name}: training" in first
        assert f"<h2>{name}</h2>" in page
    assert "<tr><td>validation loss</td><td>-</td><td>3.250</td></tr>" in page
    assert (a / "report.html").exists()


def test_names_are_escaped(tmp_path: Path) -> None:
    run = _write(tmp_path / "<b>&run", [_row(1)], config={"data": {"train": ["<script>"]}})
    page = report(run).read_text()
    assert "<b>&run" not in page
    assert "<script>" not in page


def test_bad_run_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nowhere is not a run directory"):
        report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        report(tmp_path / "empty")
    with pytest.raises(ValueError, match="has no step yet"):
        report(_write(tmp_path / "unborn", [], tail='{"st'))
    broken = _write(tmp_path / "broken", [_row(1)])
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        report(broken)


def test_loads_are_relative_to_an_even_one_and_binned() -> None:
    rows = [_row(s, loads=[[0.75, 0.25], [s / 1000, 1 - s / 1000]]) for s in range(1, 1001)]
    rows[500]["loads"][0] = [None, 1.0]
    grids = load_grid(Run("r", rows, {}, {}, {}))
    assert list(grids) == [1, 3]
    load_EX, start, end = grids[1]
    assert load_EX.shape == (2, COLUMNS)
    assert (start, end) == (512, 512000)
    np.testing.assert_allclose(load_EX, np.tile([[1.5], [0.5]], (1, COLUMNS)))
    np.testing.assert_allclose(grids[3][0].sum(axis=0), 2.0)
    assert grids[3][0][0, -1] > 1.98


def test_small_helpers() -> None:
    assert [short(v) for v in (0, 0.5, 999, 1e3, 1.5e6, 2e9, 3e12)] == ["0", "0.5", "999", "1k", "1.5M", "2B", "3T"]
    values = np.arange(500.0)
    np.testing.assert_allclose(smooth(values)[5:-5], values[5:-5])
    assert smooth(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]
    x, y = thin(np.arange(10000.0), np.ones(10000))
    assert len(x) == len(y) <= 1500
    assert (np.diff(x) > 0).all()
    assert x[0] < 10 < 9990 < x[-1]
