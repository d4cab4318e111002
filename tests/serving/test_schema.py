"""No request that the OpenAPI schema allows, and none that it forbids, makes a server fail."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from roberta_fast.serving.settings import TASKS

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_no_request_makes_a_server_fail(server, task):
    client = server(task)
    base = str(client.base_url).rstrip("/")
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    seen = {}
    for operation in schema.get_all_operations():
        operation = operation.ok()

        @settings(
            max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
        )
        def attack(case):
            response = case.call(base_url=base)
            seen.setdefault(case.operation.label, set()).add(response.status_code)
            case.validate_response(
                response,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    schemathesis.checks.status_code_conformance,
                    schemathesis.checks.content_type_conformance,
                    schemathesis.checks.response_schema_conformance,
                ],
            )

        given(case=operation.as_strategy())(attack)()
    assert len(seen) >= 12 and all(status < 500 for statuses in seen.values() for status in statuses)
    assert 200 in set().union(*seen.values())
