"""The OpenAPI document through schemathesis: what it allows is answered, and as it says."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serving.server import PATIENCE_S

pytestmark = pytest.mark.xdist_group("server")


@pytest.fixture(scope="module")
def api(running):
    return schemathesis.openapi.from_url(f"{running.http}/openapi.json")


@pytest.fixture(autouse=True)
def old_name(request):
    """schemathesis 4.32 reads a field that pytest 9.2 has only where xdist sets it."""
    node = request.node
    node._nodeid = getattr(node, "_nodeid", node.nodeid)


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_every_path(case):
    if case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        # Any text is a model's name, and any number an amount of work, as far as a schema can say.
        if case.body.get("model") is not None:
            case.body["model"] = "tiny"
        if isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 5)
        if case.body.get("n") is not None:
            case.body["n"] = min(case.body["n"], 3)
    # What the schema allows may still be too long for the context, or no token of the model.
    case.call_and_validate(timeout=PATIENCE_S, excluded_checks=[positive_data_acceptance])
