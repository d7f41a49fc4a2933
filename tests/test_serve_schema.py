"""Requests made from the server's own OpenAPI description: none makes it fail."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, settings
from serving import folder_of

from coterie.serve.app import build
from coterie.serve.settings import ServerSettings

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Any:
    engine = FakeEngine()
    engine.start()
    folder = folder_of(tmp_path_factory.mktemp("model"))
    told = ServerSettings(model_name="m", allowed_hosts=("testserver",))
    loaded = schemathesis.openapi.from_asgi("/openapi.json", build(engine, told, folder))
    yield loaded
    engine.stop()


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_request_of_the_schema_makes_the_server_fail(case: Any) -> None:
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "m"
    answer = case.call()
    assert answer.status_code < 500, answer.text
    documented = case.operation.definition.raw["responses"]
    assert str(answer.status_code) in documented or answer.status_code == 405
    if answer.status_code >= 400:
        assert set(answer.json()) == {"error"}
