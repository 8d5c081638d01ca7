"""The OpenAPI document says what the server does: schemathesis compares the two.

Each operation gets examples that the document allows and examples that it forbids, and all of
schemathesis's checks: no 5xx, documented statuses and content types, answers of the documented
shape, what is forbidden refused, what is allowed taken, keys asked for where the document says so.
"""

import pytest

from serving.keys import Keys, create

EXAMPLES = 12  # of each operation


@pytest.fixture(scope="module", params=["anybody", "keys"])
def document(request, served, tmp_path_factory):
    folder = tmp_path_factory.mktemp("openapi")
    keys, headers = None, {}
    if request.param == "keys":
        headers = {"authorization": f"Bearer {create(folder / 'keys.json', 'alice')}"}
        keys = Keys(folder / "keys.json")
    with served(keys=keys) as running:
        running.headers = headers
        yield running
