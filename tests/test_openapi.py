"""The API keeps to its own description: schemathesis asks it, in process, a tiny random model."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks
from starlette.testclient import TestClient

from minigpt4.web.api import openapi
from minigpt4.web.api.routes import application
from tests.api_case import MODEL, engine_fixture

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
]
# What is generated follows the description, but not what only code can say (there is a user's
# message, there is one such model): many are refused, and checked just as well.
schema = schemathesis.openapi.from_dict(openapi.description())
schema.config.generation.update(modes=list(schemathesis.GenerationMode))


engine = engine_fixture()


@pytest.fixture(scope="module")
def app(engine):
    return application(engine)


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app) as client:
        yield client


made_up = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check(case, app) -> None:
    """A made-up request, right or wrong, is answered as described."""
    if (
        isinstance(case.body, dict)
        and "questions" not in case.body
        and case.meta.generation.mode.is_positive
    ):
        case.body.pop("max_completion_tokens", None)
        name = "max_output_tokens" if "input" in case.body else "max_tokens"
        case.body[name] = 2  # an answer may be short
    response = case.call(app=app)
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400:
        sentence = response.json()["error"]["message"]
        assert "\n" not in sentence and "Traceback" not in sentence


# One test for each operation: pytest-xdist runs tests of one name once.
@schema.include(path="/v1/chat/completions").parametrize()
@made_up
@pytest.mark.trust("Protocol", "requests made up from the API's own description (schemathesis)")
def test_made_up_completions(case, app):
    check(case, app)


@schema.include(path="/v1/responses").parametrize()
@made_up
@pytest.mark.trust("Protocol", "requests made up from the API's own description (schemathesis)")
def test_made_up_responses(case, app):
    check(case, app)


@schema.include(path="/v1/decisions").parametrize()
@made_up
@pytest.mark.trust("Protocol", "requests made up from the API's own description (schemathesis)")
def test_made_up_decisions(case, app):
    check(case, app)


@schema.include(path="/v1/models").parametrize()
@made_up
def test_made_up_lists(case, app):
    check(case, app)


@schema.include(path="/v1/models/{name}").parametrize()
@made_up
def test_made_up_models(case, app):
    check(case, app)


def test_each_operation_is_made_up():
    answering = {"/v1/chat/completions", "/v1/responses", "/v1/decisions"}
    tried = answering | {"/v1/models", "/v1/models/{name}"}
    assert {operation.ok().path for operation in schema.get_all_operations()} == tried


ASKED = [{"role": "user", "content": "Hello?"}]
SOUND = [
    {"messages": ASKED},
    {"messages": ASKED, "stream": True, "stream_options": {"include_usage": True}},
    {"messages": ASKED, "logprobs": True, "model": MODEL, "stop": ["a", "b"], "n": 1},
    {"messages": [{"role": "system", "content": "Be brief."}, *ASKED], "temperature": 0},
]


@pytest.mark.parametrize("body", SOUND, ids=range(len(SOUND)))
@pytest.mark.trust("Protocol", "requests made up from the API's own description (schemathesis)")
def test_answers_are_as_described(client, body):
    """Not left to chance: whole answers, streams, log-probabilities."""
    case = schema["/v1/chat/completions"]["POST"].Case(body={"max_tokens": 3, **body})
    response = client.post("/v1/chat/completions", json=case.body)
    assert response.status_code == 200
    described = openapi.description()["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]
    kind = response.headers["content-type"].split(";")[0]
    assert kind in described["content"] and ("stream" in body) == (kind == "text/event-stream")
    if kind == "application/json":
        schema["/v1/chat/completions"]["POST"].validate_response(response)


def test_the_description_is_served(client):
    response = client.get("/v1/openapi.json")
    assert response.json() == json.loads(json.dumps(openapi.description()))
    assert client.post("/v1/openapi.json").status_code == 405
    assert all(path.startswith("/v1/") for path in response.json()["paths"])
