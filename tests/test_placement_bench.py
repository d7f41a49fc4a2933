"""The benchmark of placements: its peers, its routes, its yardstick, and that it runs."""

import base64
import builtins
import re
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from coterie.benchmarks import placement as bench
from coterie.benchmarks.placement_exact import exact
from coterie.benchmarks.placement_page import Part, _by_copy
from coterie.benchmarks.placement_peers import dealt_activated, dealt_targets, eplb, pack
from coterie.benchmarks.placement_routes import Source
from coterie.benchmarks.rows import read
from coterie.infer.placement import Cluster, Placement
from coterie.infer.placement_plan import plan
from coterie.infer.placement_score import Aim, score
from coterie.infer.routes import Recorder, Routes, save


def test_eplb_gives_what_its_readme_prints() -> None:
    """12 experts in 4 groups, 16 replicas, 2 nodes of 4 GPUs (github.com/deepseek-ai/EPLB): which experts each GPU
    holds, layer by layer; the order of equals is not told."""
    weights = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    printed = [
        [[5, 6], [5, 7], [8, 4], [3, 4], [10, 9], [10, 2], [0, 1], [11, 1]],
        [[7, 10], [6, 8], [6, 11], [8, 9], [2, 4], [5, 1], [5, 0], [3, 1]],
    ]
    for tokens, ranks in zip(weights, printed, strict=True):
        copies_RE = eplb(np.array(tokens), 16, 2, 8, groups=4)
        found = [np.flatnonzero(row).tolist() for row in copies_RE]
        assert sorted(map(sorted, found[:4])) in (sorted(map(sorted, ranks[:4])), sorted(map(sorted, ranks[4:])))
        assert sorted(map(sorted, found)) == sorted(map(sorted, ranks))


def test_packs_are_equal_in_number_and_the_least_is_filled_first() -> None:
    assert pack(np.array([5, 4, 3, 1]), 2).tolist() == [0, 1, 1, 0]


def test_tokens_are_dealt_to_copies_in_turn() -> None:
    copies_RE = np.array([[2, 0], [1, 1]])
    loads_SE = np.array([[1, 0], [2, 5], [9, 1]])
    assert dealt_activated(loads_SE, copies_RE).tolist() == [[1, 0], [2, 1], [2, 2]]
    assert dealt_targets(copies_RE).tolist() == [[0, 1], [0, 1]]


def test_routes_are_skewed_repeat_and_move() -> None:
    def shares(zipf: float, kind="steady") -> np.ndarray:
        loads_SE = Source(32, 4, 1, zipf, kind, 512, 8).routes().loads_SLE[:, 0]
        assert (loads_SE.sum(1) == 4 * 512).all()
        return loads_SE / loads_SE.sum(1, keepdims=True)

    np.testing.assert_array_equal(shares(1.0), shares(1.0))
    assert shares(0.6).mean(0).max() < shares(1.4).mean(0).max()

    def change(kind) -> float:
        half = shares(1.0, kind)
        return float(abs(half[:4].mean(0) - half[4:].mean(0)).sum())

    assert change("drifting") > 2 * change("steady")
    sample = Source(32, 4, 1, 1.4, "steady", 64, 2).routes().sampled_LTK[0]
    assert all(len(set(ids)) == 4 for ids in sample.tolist())


def brute(loads_SE: np.ndarray, ranks: int, slots: int, part: str) -> float:
    """The best of all placements with at most so many slots."""
    E, best = loads_SE.shape[1], np.inf
    rows = [row for row in product([0, 1], repeat=E) if sum(row) <= slots]
    recorder = Recorder([E], 1)
    for loads_E in loads_SE:
        recorder.add([loads_E], None, 0)
    for held in product(rows, repeat=ranks):
        if all(map(any, zip(*held, strict=True))):
            lists = [np.flatnonzero(row).tolist() for row in held]
            filled = np.array([[mine + [-1] * (slots - len(mine)) for mine in lists]])
            best = min(best, getattr(score(Placement(filled, (E,)), recorder.routes()), part))
    return best


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_the_yardstick_is_the_optimum(part) -> None:
    pytest.importorskip("scipy", reason="the yardstick needs scipy")
    loads_SE = np.random.default_rng(1).integers(0, 9, (3, 4)) * np.array([[1, 1, 1, 3]])
    held_RE, value = exact(loads_SE, 2, 3, part)
    assert held_RE.sum(1).max() <= 3
    assert value == pytest.approx(brute(loads_SE, 2, 3, part))


@pytest.mark.parametrize(("part", "aim"), [("prefill", Aim(crossings=0)), ("decode", Aim(0, 1, 0))])
def test_plans_are_close_to_the_optimum(part, aim) -> None:
    pytest.importorskip("scipy", reason="the yardstick needs scipy")
    for zipf in (0.6, 1.4):
        routes = Source(8, 2, 1, zipf, "bursty", 8, 4).routes()
        _, best = exact(routes.loads_SLE[:, 0], 3, 3, part)
        assert best - 1e-6 <= getattr(score(plan(routes, Cluster(1, 3, 3), aim), routes), part) <= 1.05 * best


def test_without_scipy_the_extra_is_named(monkeypatch) -> None:
    real = builtins.__import__

    def absent(name, *more, **how):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *more, **how)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'coterie\[plan\]'"):
        exact(np.ones((1, 2)), 2, 1, "prefill")


def test_it_runs_and_tells_every_ratio(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", (bench.SHAPES[0],) * 2)
    monkeypatch.setattr(bench, "plan_times", lambda quick: [])
    monkeypatch.setattr(bench, "exact", lambda *given: None)  # not proven
    rows = bench.main(tmp_path / "rows.json", quick=True)
    assert read(tmp_path / "rows.json") == rows
    found = {(row.case, row.impl, row.metric): row.value for row in rows}
    cases = [case for case, impl, metric in found if (impl, metric) == ("eplb", "activated") and "decode" in case]
    ratios = [found[c, "coterie", "activated"] / found[c, "eplb", "activated"] for c in cases]
    group = f"all decode, {bench.SHAPES[0].name}"
    assert found[group, "over eplb", "activated worst"] == max(ratios) < 1
    assert all(row.limit is None for row in rows if row.case.startswith("optimum"))


def day(path: Path, steps: int = 4) -> Path:
    """A file with steps of both kinds."""
    prefill, decode = (Source(8, 2, 2, 1.0, "steady", 64, steps, prompts).routes() for prompts in (True, False))
    both = [
        np.concatenate([getattr(r, n) for r in (prefill, decode)]) for n in ("loads_SLE", "tokens_SMLK", "prompts_S")
    ]
    save(Routes(*both, prefill.experts), path)
    return path


def test_recorded_routes_are_judged_by_what_their_steps_were(tmp_path) -> None:
    rows = bench.main(routes=day(tmp_path / "day"), cluster=Cluster(2, 2, 3))
    assert {row.case for row in rows if row.metric == "activated"} == {"prefill, day", "decode, day"}


def test_the_page_shows_both_kinds_before_and_after_and_what_it_gains(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    rows = bench.main(routes=day(tmp_path / "day"), cluster=Cluster(2, 2, 3), html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    texts = [base64.b64decode(image).decode() for image in images]
    assert len(texts) == 2
    for text in texts:
        assert ElementTree.fromstring(text).tag.endswith("svg")
        assert "experts in order: copies" in text
        assert "as planned: ranks" in text
    found = {(row.case, row.impl, row.metric): row.value for row in rows}
    for case, metric in (("prefill, day", "imbalance"), ("decode, day", "activated")):
        before, after = (found[case, impl, metric] for impl in ("round robin", "coterie"))
        assert f"{after / before - 1:+.1%}" in page
    assert 'src="http' not in page


def test_shares_of_a_page_are_the_work_of_each_copy() -> None:
    loads_SLE = np.array([[[6, 3, 1]], [[2, 5, 0]]], np.uint32)
    routes = Routes(loads_SLE, np.full((2, 1, 1, 1), -1, np.int16), np.zeros(2, np.uint32), (3,))
    before, after = np.array([[[2, 0, 0], [0, 1, 1]]]), np.array([[[1, 1, 0], [1, 0, 1]]])
    prefill, decode = (Part(name, routes, before, after, []) for name in ("prefill", "decode"))
    np.testing.assert_allclose(prefill.shares(False)[0], np.array([[8, 0, 0], [0, 8, 1]]) * 2 / 17)
    np.testing.assert_allclose(prefill.shares(True)[0], np.array([[4, 8, 0], [4, 0, 1]]) * 2 / 17)
    np.testing.assert_allclose(decode.shares(False)[0], np.array([[4, 0, 0], [0, 2, 1]]) * 2 / 7)
    assert decode.shares(True).sum() == 2
    assert decode.shares(True)[0, 0, 1] == decode.shares(True)[0, 1, 2] * 2 == 2 * 2 / 5
    by_copy_LC, ends = _by_copy(prefill.shares(False), before)
    np.testing.assert_allclose(by_copy_LC, np.array([[4, 4, 8, 1]]) * 4 / 17)
    assert ends == [2]


def test_a_page_of_nothing_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="give their file"):
        bench.main(html=tmp_path / "page.html")
    with pytest.raises(ValueError, match="too few steps"):
        bench.main(routes=day(tmp_path / "day", 1), html=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
