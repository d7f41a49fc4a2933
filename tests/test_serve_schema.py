"""Requests made from the server's own OpenAPI description: none makes it fail."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from serving import Running, client_of, folder_of

from coterie.serve.chat_protocol import ChatRequest
from coterie.serve.protocol import CompletionRequest


@pytest.mark.slow
def test_no_request_of_the_schema_makes_the_server_fail(tmp_path: Any) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    seen: set[int] = set()
    engine = FakeEngine()
    with Running(engine, folder_of(tmp_path)) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 7
        for operation in operations:

            @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
            @given(operation.as_strategy())
            def one(case: Any) -> None:
                if isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = "fake"  # else nothing is looked at but this
                answer = case.call()
                seen.add(answer.status_code)
                assert answer.status_code < 500, answer.text
                assert str(answer.status_code) in case.operation.definition.raw["responses"]
                assert answer.status_code == 200 or set(answer.json()) == {"error"}

            one()
        assert {200, 400, 404} <= seen
        assert engine.submitted
        assert engine.idle


def test_the_schema_has_the_bodies_that_are_checked(tmp_path: Any) -> None:
    with client_of(FakeEngine(), folder_of(tmp_path)) as client:
        schema = client.get("/openapi.json").json()
    for path, kind in (("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)):
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{kind.__name__}"}
        listed = schema["components"]["schemas"][kind.__name__]
        assert set(listed["properties"]) == set(kind.model_fields)
        assert listed["additionalProperties"] is False
