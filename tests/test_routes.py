"""Recorded routes: what is kept, what is derived, what a file may hold."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coterie.infer.routes import FORMAT, Recorder, Routes, load, save


def some(steps: int = 5, tokens: int = 7, experts=(4, 6), top_k: int = 2, seed: int = 0, **how) -> Routes:
    dice = np.random.default_rng(seed)
    recorder = Recorder(experts, top_k, **how)
    for step in range(steps):
        ids_LTK = np.stack([[dice.choice(E, top_k, replace=False) for _ in range(tokens)] for E in experts])
        recorder.add(
            [np.bincount(ids.ravel(), minlength=E) for ids, E in zip(ids_LTK, experts, strict=True)], ids_LTK, step
        )
    return recorder.routes()


def test_loads_and_a_sample_are_kept() -> None:
    routes = some(sampled=3)
    assert routes.loads_SLE.shape == (5, 2, 6)
    assert (routes.loads_SLE.sum(2) == 14).all()
    assert not routes.loads_SLE[:, 0, 4:].any()
    assert routes.tokens_SMLK.shape == (5, 3, 2, 2)
    assert (routes.tokens_SMLK >= 0).all()
    assert routes.prompts_S.tolist() == [0, 1, 2, 3, 4]


def test_the_sample_is_spread_over_a_steps_tokens() -> None:
    recorder = Recorder([100], 1, sampled=4)
    recorder.add(np.ones((1, 100)), np.arange(100).reshape(1, 100, 1), 0)
    recorder.add(np.ones((1, 100)), np.arange(2).reshape(1, 2, 1), 0)
    recorder.add(np.ones((1, 100)), None, 0)
    sample = recorder.routes().tokens_SMLK[..., 0, 0]
    assert sample.tolist() == [[12, 37, 62, 87], [0, 1, -1, -1], [-1] * 4]


def test_memory_is_bounded_and_what_is_kept_is_spread_evenly() -> None:
    recorder = Recorder([3], 1, sampled=1, memory=10 * (4 * 3 + 2 + 4))
    fetched = []
    for step in range(1000):
        if recorder.wanted:
            fetched.append(step)
        recorder.add([[step, 0, 0]], None, 0)
    kept = recorder.routes().loads_SLE[:, 0, 0].tolist()
    assert 5 <= len(kept) <= 10
    assert kept[0] == 0
    assert len(set(np.diff(kept))) == 1
    assert set(kept) <= set(fetched)
    assert len(fetched) < 60
    recorder.clear()
    assert recorder.wanted
    assert len(recorder.routes()) == 0


def test_pairs_and_transitions_equal_loops() -> None:
    routes = some(sampled=7)
    pairs, then = np.zeros((2, 6, 6)), np.zeros((1, 6, 6))
    for token in routes.tokens_SMLK.reshape(-1, 2, 2):
        for layer in range(2):
            a, b = token[layer]
            pairs[layer, a, b] += 1
            pairs[layer, b, a] += 1
        for f in token[1]:
            then[0, token[0][0], f] += 1
    np.testing.assert_array_equal(routes.pairs_LEE, pairs)
    np.testing.assert_array_equal(routes.transitions_LEE, then)


def test_parts_and_layers() -> None:
    routes = some()
    assert routes.part(slice(1, 3)).prompts_S.tolist() == [1, 2]
    assert routes.part(routes.prompts_S == 4).prompts_S.tolist() == [4]
    first = routes.layers([0])
    assert first.experts == (4,)
    np.testing.assert_array_equal(first.loads_SLE, routes.loads_SLE[:, :1, :4])


def test_a_file_keeps_everything_and_is_compact(tmp_path) -> None:
    routes = some(steps=50)
    save(routes, tmp_path / "r")
    again = load(tmp_path / "r")
    for name in ("loads_SLE", "tokens_SMLK", "prompts_S"):
        np.testing.assert_array_equal(getattr(again, name), getattr(routes, name))
    assert again.experts == routes.experts
    assert again.loads_SLE.dtype == np.uint8
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


WRONG = (
    *("absent", "short", "text", "huge header", "huge shape", "unmarked", "a part more", "a part less", "floats"),
    *("experts of no shape", "no layers", "more experts", "negative experts", "an expert too high"),
    *("an expert too low", "a load of nobody", "other steps"),
)


def hostile(tmp_path, name: str):
    """A file with one thing wrong."""
    path = tmp_path / "r"
    save(some(), path)
    parts, mark = load_file(path), {"format": FORMAT}
    match name:
        case "absent":
            path.unlink()
            return path
        case "short":
            path.write_bytes(path.read_bytes()[:-1])
            return path
        case "text":
            path.write_text("not routes at all")
            return path
        case "huge header":
            path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
            return path
        case "huge shape":
            head = json.dumps(
                {"loads": {"dtype": "U8", "shape": [1 << 40, 1, 1], "data_offsets": [0, 1 << 40]}}
            ).encode()
            path.write_bytes(struct.pack("<Q", len(head)) + head)
            return path
        case "unmarked":
            mark = {}
        case "a part more":
            parts["more"] = np.zeros(1)
        case "a part less":
            del parts["prompts"]
        case "floats":
            parts["loads"] = parts["loads"].astype(np.float32)
        case "experts of no shape":
            parts["experts"] = np.array(3, np.int32)
        case "no layers":
            parts["experts"] = np.zeros(0, np.int32)
        case "more experts":
            parts["experts"] = np.array([4, 7], np.int32)
        case "negative experts":
            parts["experts"] = np.array([-4, 6], np.int32)
        case "an expert too high":
            parts["tokens"][0, 0, 0, 0] = 4
        case "an expert too low":
            parts["tokens"][0, 0, 0, 0] = -2
        case "a load of nobody":
            parts["loads"][0, 0, 5] = 1
        case "other steps":
            parts["prompts"] = parts["prompts"][:-1]
    save_file({k: np.ascontiguousarray(v) for k, v in parts.items()}, path, metadata=mark)
    return path


@pytest.mark.parametrize("name", WRONG)
def test_a_hostile_file_is_refused_in_one_sentence(name, tmp_path) -> None:
    path = hostile(tmp_path, name)
    with pytest.raises(ValueError, match=str(path)) as refused:
        load(path)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch) -> None:
    save(some(), tmp_path / "r")
    monkeypatch.setattr("coterie.infer.routes.LARGEST", 100)
    with pytest.raises(ValueError, match="over the 100"):
        load(tmp_path / "r")
