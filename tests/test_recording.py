"""Recording an engine's steps: what is kept, when it is written, where it may not be."""

import logging
import time
from pathlib import Path

import numpy as np
import pytest
from engines import ask, drain, engine, prompt

from coterie.cli_serve import serve
from coterie.infer.config import EngineConfig
from coterie.infer.engine import Engine
from coterie.infer.pipeline import Pipeline
from coterie.infer.recording import Recording, check_path
from coterie.infer.routes import load, spread_places
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.serve.settings import ServerSettings


def test_places_are_spread_and_every_token_has_its_turn() -> None:
    def places(tokens: int, turn: int | None = None) -> list[int]:
        return list(range(tokens))[spread_places(tokens, 4, turn)]

    assert places(100) == [12, 37, 62, 87]
    assert places(100, 26) == [1, 26, 51, 76]
    assert places(2) == [0, 1]
    assert places(0) == []
    for tokens in (1, 3, 7, 12, 101):
        turns = [places(tokens, turn) for turn in range(tokens)]
        assert all(len(one) == min(4, tokens) for one in turns)
        assert {place for one in turns for place in one} == set(range(tokens))


def test_a_recording_has_every_steps_loads_and_its_tokens_choices(tmp_path: Path) -> None:
    served, reports = engine(budget=16), []
    served.watch(reports.append, sampled=1000)
    with Recording(served, tmp_path / "r") as recording:
        clients = [ask(served, prompt(n, n), routes=True) for n in (5, 37)]
        drain(served)
    routes = load(tmp_path / "r")
    assert routes.experts == (4, 8)
    assert len(routes) == len(reports)
    for step, report in enumerate(reports):
        assert routes.loads_SLE[step, 0, :4].tolist() == list(report.loads[0])
        assert routes.loads_SLE[step, 1].tolist() == list(report.loads[1])
        for ids, loads in zip(report.routes_LMK, report.loads, strict=True):
            assert np.bincount(ids.ravel(), minlength=len(loads)).tolist() == list(loads)
        kept = routes.tokens_SMLK[step]
        assert (kept >= 0).all((1, 2)).sum() == min(4, report.tokens)
        all_TLK = report.routes_LMK.transpose(1, 0, 2).tolist()
        assert all(token.tolist() in all_TLK for token in kept[: report.tokens])
    assert routes.prompts_S.sum() == 5 + 37
    assert routes.prompts_S[-1] == 0
    told = {token for client in clients for delta in client.deltas[0] for token in delta.routes}
    last = {tuple(map(tuple, token)) for token in reports[-1].routes_LMK.transpose(1, 0, 2).tolist()}
    assert last <= told
    ask(served, prompt(3))
    drain(served)
    assert len(reports) > len(routes) == recording.steps == recording.kept


def test_choices_are_told_only_where_asked_for() -> None:
    served, reports = engine(), []
    served.watch(reports.append)
    unwatch = served.watch(lambda report: None, sampled=2)
    ask(served, prompt(9))
    served.step()
    unwatch()
    drain(served)
    assert reports[0].routes_LMK.shape == (2, 2, 2)
    assert all(report.routes_LMK is None for report in reports[1:])


def test_it_is_written_now_and_then_and_a_reader_never_sees_half(tmp_path: Path) -> None:
    served, path, sizes = engine(), tmp_path / "r", []
    with Recording(served, path, every_s=0.001) as recording:
        for n in range(1, 30):
            ask(served, prompt(n, n))
            while served.step():
                if path.exists():
                    sizes.append(len(load(path)))
        assert recording.saved > 0
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3
    assert len(load(path)) == recording.steps == recording.kept
    assert recording.tokens == load(path).loads_SLE[:, 0].sum() / 2
    assert [file.name for file in tmp_path.iterdir()] == ["r"]


def test_without_a_step_nothing_is_written(tmp_path: Path) -> None:
    with Recording(engine(), tmp_path / "r"):
        pass
    assert not list(tmp_path.iterdir())


def test_many_prompts_through_the_pipeline(tmp_path: Path) -> None:
    pipe = Pipeline(engine())
    with Recording(pipe.engine, tmp_path / "r"):
        pipe([prompt(n, n) for n in range(2, 12)], max_new_tokens=4)
    assert load(tmp_path / "r").prompts_S.sum() == sum(range(2, 12))


def test_a_write_that_fails_is_told_and_tried_again(tmp_path: Path, caplog) -> None:
    served, folder = engine(), tmp_path / "d"
    folder.mkdir()
    recording = Recording(served, folder / "r", every_s=0.001)
    folder.rmdir()
    with caplog.at_level(logging.ERROR, logger="coterie"):
        ask(served, prompt(3))
        drain(served)
        end = time.monotonic() + 20
        while "cannot be written" not in caplog.text and time.monotonic() < end:
            time.sleep(0.01)
    assert "cannot be written" in caplog.text
    folder.mkdir()
    recording.close()
    assert len(load(folder / "r")) == recording.steps


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"weights")
    for path, why in ((tmp_path / "no" / "r", "No such"), (tmp_path, "holds no routes"), (other, "holds no routes")):
        for refusing in (lambda path=path: check_path(path), lambda path=path: Recording(engine(), path)):
            with pytest.raises(ValueError, match=why) as refused:
                refusing()
            assert str(path) in str(refused.value)
            assert "\n" not in str(refused.value)
    assert other.read_bytes() == b"weights"
    assert [file.name for file in tmp_path.iterdir()] == [other.name]


def test_routes_from_before_are_replaced(tmp_path: Path) -> None:
    served, path = engine(), tmp_path / "r"
    for n in (3, 5):
        with Recording(served, path):
            ask(served, prompt(n, n))
            drain(served)
        assert load(path).prompts_S.sum() == n


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    model = GPT(ModelConfig(vocab_size=32, max_positions=16, layers=1, dim=8, heads=1, hidden=8))
    model.init_weights(1)
    with pytest.raises(ValueError, match="no experts"):
        Recording(Engine(model, None, EngineConfig()), tmp_path / "r")


def test_the_command_refuses_before_it_opens_a_model(tmp_path: Path) -> None:
    nowhere = ServerSettings(record=str(tmp_path / "no" / "r"))
    for ranks in (1, 2):
        with pytest.raises(ValueError, match="cannot be recorded to"):
            serve(tmp_path / "no model", nowhere, ranks=ranks)
    for how in ({"replicas": 2}, {"ray": True}):
        with pytest.raises(ValueError, match="one process's file"):
            serve(tmp_path / "no model", ServerSettings(record=str(tmp_path / "r")), **how)
