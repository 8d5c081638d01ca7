"""The OpenAPI document says what the server does: schemathesis compares the two.

Each operation gets examples that the document allows and examples that it forbids, and all of
schemathesis's checks: no 5xx, documented statuses and content types, answers of the documented
shape, what is forbidden refused, what is allowed taken, keys asked for where the document says so.
"""

import dataclasses

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serving.batches.service import open_batches
from serving.config import BatchesConfig
from serving.gateway.app import make_app
from serving.keys import Keys, create

EXAMPLES = 12  # of each operation
GENERATION = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")


class NoQueue:
    """Takes batches, and has nobody work on them."""

    async def put(self, batch_id):
        pass


@pytest.fixture(scope="module", params=["anybody", "keys"])
def api(request, served, tmp_path_factory):
    folder = tmp_path_factory.mktemp("openapi")
    keys, headers = None, {}
    if request.param == "keys":
        token = create(folder / "keys.json", "alice")
        keys, headers = Keys.load(folder / "keys.json"), {"Authorization": f"Bearer {token}"}
    parts = served(keys=keys)
    with parts as running:
        batches = open_batches(BatchesConfig(dir=str(folder / "batches")))
        app = make_app(running.gateway, dataclasses.replace(batches, queue=NoQueue()))
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        # Each request gets a right key: one that was to lack it would be called wrong, and taken.
        schema.config.generation.update(with_security_parameters=False)
        yield schema, headers
        batches.database.close()


def test_the_document_is_valid_and_says_who_may_ask(api):
    schema, headers = api
    schema.validate()
    for result in schema.get_all_operations():
        operation = result.ok()
        needs_key = bool(headers) and operation.path.startswith("/v1/")
        raw = operation.definition.raw
        assert bool(raw.get("security")) == needs_key, operation.label


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_server_does_what_the_document_says(api, mode):
    schema, headers = api
    failures = []
    for result in schema.get_all_operations():
        operation = result.ok()
        can_be_wrong = operation.body or operation.query  # in a path, any text is right
        if mode.is_positive or can_be_wrong:
            failures += broken(operation, mode, headers)
    assert not failures, "\n\n".join(failures)


def broken(operation, mode, headers):
    """What the checks say of one operation."""
    # Rules between fields, the context and the vocabulary are not in the document.
    is_generation = operation.path in GENERATION
    excluded = [positive_data_acceptance] if is_generation else []

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def holds(case):
        if is_generation and mode.is_positive:
            case.body["model"] = "tiny"  # which the document does not know
        case.call_and_validate(headers=headers, excluded_checks=excluded)

    try:
        holds()
    except FailureGroup as e:
        return [f"{operation.label}: {e}"]
    return []
