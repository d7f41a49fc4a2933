"""`coterie serve` with several ranks: it answers, drains, and ends when a rank is lost."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from serving import Process, process, save_model, until

from coterie.cli import main
from coterie.infer.config import EngineConfig
from coterie.infer.pipeline import pipeline
from coterie.serve.ranks import launch_ranks
from coterie.serve.settings import ServerSettings

httpx = pytest.importorskip("httpx")
psutil = pytest.importorskip("psutil")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def _command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "coterie.cli", "serve", str(folder), "--port", "0", "--model-name", "m", *words]


def _ranks(server: Process) -> list[psutil.Process]:
    """First the one that serves."""
    found = {int(one.environ()["RANK"]): one for one in psutil.Process(server.inner.pid).children()}
    return [found[rank] for rank in sorted(found)]


def test_it_answers_as_one_rank_does_and_drains(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    with process(tmp_path, _command(tmp_path / "model", "--ep", "2", "--tp", "2")) as server:
        body = {"model": "m", "prompt": "the cat", "max_tokens": 20, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        text = pipeline(tmp_path / "model")("the cat", temperature=0, max_tokens=20)[0].text
        assert answer.json()["choices"][0]["text"] == text
        ranks = _ranks(server)
        assert len(ranks) == 2
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body | {"stream": True, "ignore_eos": True}
        ) as s:
            lines = s.iter_lines()
            next(lines)
            server.inner.send_signal(signal.SIGTERM)
            rest = [line.removeprefix("data: ") for line in lines if line]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert server.end(40) == 0
        assert not any(one.is_running() for one in ranks)


@pytest.mark.parametrize("idle", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_lost_rank_ends_it_and_everyone_is_told(tmp_path: Path, idle: bool) -> None:
    save_model(tmp_path / "model")
    with process(tmp_path, _command(tmp_path / "model", "--ep", "2")) as server:
        _, other = _ranks(server)
        if idle:
            other.kill()
        else:
            body = {"model": "m", "prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                other.kill()
                rest = [line.removeprefix("data: ") for line in lines if line]
            assert "error" in json.loads(rest[-2])
        start = time.monotonic()
        assert server.end(60) == 128 + signal.SIGKILL
        assert time.monotonic() - start < 30
    assert "was killed by SIGKILL: the server ends" in (tmp_path / "log").read_text()


@pytest.mark.long
def test_the_first_rank_does_not_leave_the_others(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    with process(tmp_path, _command(tmp_path / "model", "--ep", "2")) as server:
        first, other = _ranks(server)
        first.kill()
        assert server.end(60) != 0
        until(lambda: not other.is_running())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--ep", "3"], "4 experts do not spread over ep=3"),
        (["--tp", "4"], "tp=4 does not divide heads 2"),
        (["--ep", "2", "--ranks", "3"], "need 2 ranks or a multiple of them, not 3"),
        (["--ep", "2", "--replicas", "2"], "give replicas, or ranks with tp, ep and etp, not both"),
        (["--ranks", "-1"], "give 1 or more"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_a_rank_starts(
    tmp_path: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model")
    with pytest.raises(SystemExit, match="2"):
        main(["serve", str(tmp_path / "model"), *words])
    told = capsys.readouterr().err
    assert why in told
    assert len(told.splitlines()) == 1


def test_no_model_is_told_before_a_rank_starts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        launch_ranks(tmp_path / "none", ServerSettings(), EngineConfig(ep=2), 2)
