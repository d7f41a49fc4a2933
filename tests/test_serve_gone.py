"""Clients that go away from the real engine: whatever their request is at, nothing is left of it within a step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from engines import check_empty, engine, prompt
from serving import Running, until

from coterie.infer import grammar
from coterie.infer.outputs import StepReport

LONG = {"max_tokens": 100, "ignore_eos": True, "temperature": 0}


def _live(served: Any, wanted: Callable[[Any], bool]) -> bool:
    return any(wanted(one) for one in list(served.core.live.values()))


REACHED: dict[str, Callable[[Any, StepReport], bool]] = {
    "queued": lambda served, report: report.waiting > 0,
    "prefill": lambda served, report: _live(served, lambda one: 0 < one.request.computed < len(one.request.prompt)),
    "decode": lambda served, report: _live(served, lambda one: one.told > 2),
    "streaming": lambda served, report: _live(served, lambda one: one.told > 2),
    "grammar": lambda served, report: False,
}


@pytest.mark.parametrize("phase", REACHED)
def test_nothing_is_left_within_a_step(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: Any = engine(text=True, budget=16, max_sequences=1 if phase == "queued" else 8)
    served.gate, there, reports = threading.Event(), threading.Event(), list[StepReport]()

    def hold(report: StepReport) -> None:
        reports.append(report)
        if not served.gate.is_set() and REACHED[phase](served, report):
            there.set()
            served.gate.wait(20)

    def compile(*given: Any, **settings: Any) -> Any:
        there.set()
        served.gate.wait(20)
        return made(*given, **settings)

    served.watch(hold)
    made = grammar.compile_grammar
    monkeypatch.setattr(grammar, "compile_grammar", compile)
    with Running(served, model_name="fake") as server:
        body: dict[str, Any] = {"prompt": prompt(50), **LONG, "stream": phase == "streaming"}
        if phase == "grammar":
            pytest.importorskip("llguidance")
            body["structured_outputs"] = {"regex": "[a-z]*"}
        first = server.ask(prompt=prompt(3), **LONG) if phase == "queued" else None
        gone = server.ask(**body)
        assert there.wait(20)
        data = b""
        while phase == "streaming" and b"data: " not in data:
            data += gone.recv(65536)
        gone.close()
        if phase != "grammar":  # which nobody has to end before it is in the engine
            until(lambda: bool(served._aborts))
        before = len(reports)
        served.gate.set()
        until(lambda: server.app.state.life.active == (first is not None))
        if first is not None:
            assert not any(report.waiting for report in reports[before:])
            first.close()
        until(lambda: served.idle and server.app.state.life.active == 0)
        if phase not in ("queued", "grammar"):
            assert not any(report.blocks_used for report in reports[before:])
        assert len(reports) < 60  # none ran to its end
    check_empty(served)
