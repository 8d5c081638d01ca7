"""Six families in the columns that training needs, and what the table makes of what it is told.

`make families` measures all families in all columns.
"""

import pytest

from core.errors import ConfigError
from tests.families.cells import Cell, Cells
from tests.families.page import write_page
from tests.families.table import measure, prepare
from tests.families.workers import Workers, Wrong

FAMILIES = ("llama", "gemma4_text", "mixtral", "gpt_neox", "mamba", "falcon")
MEASURED = ("loss", "fsdp", "export")


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    prepare(root, list(FAMILIES))
    found = Cells(root / "cells.json", root)
    measure(root, [(family, column) for family in FAMILIES for column in MEASURED], found)
    return found


@pytest.mark.long
@pytest.mark.timeout(900)  # whichever comes first measures for all
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("column", MEASURED)
def test_training_is_that_of_transformers(cells, family, column):
    cell = cells.get(family, column)
    assert cell is not None
    assert cell.state == "ok", cell.said


def dies():
    raise SystemExit(3)


def never_ends():
    import time

    time.sleep(60)


def is_wrong():
    raise Wrong("2 is not 3")


def refuses():
    raise ConfigError("key", "value", "is no good", "use another")


def breaks():
    raise ValueError("first line\nsecond line")


def returns():
    return "done"


@pytest.mark.long
def test_what_becomes_of_a_call(tmp_path):
    worker = Workers("one", tmp_path)

    def outcome(name, timeout_s=60.0):
        found = worker.call(f"test_table.{name}", timeout_s=timeout_s)
        return found.state, found.said

    assert outcome("returns") == ("ok", "done")
    assert outcome("is_wrong") == ("wrong", "2 is not 3")
    assert outcome("refuses") == ("refused", "key=value: is no good; use another")
    assert outcome("breaks") == ("wrong", "ValueError: first line")
    assert outcome("never_ends", timeout_s=1.0) == ("wrong", "no end after 1 s")
    assert outcome("returns") == ("ok", "done")
    worker.close()


def test_cells_of_another_state_of_the_product_are_forgotten(tmp_path):
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "loop.py").write_text("a = 1\n")
    cell = Cell("refused", "key=value: is no good; use another", 1.5)
    Cells(tmp_path / "cells.json", tmp_path).put("llama", "ddp", cell)
    assert Cells(tmp_path / "cells.json", tmp_path).get("llama", "ddp") == cell
    (package / "loop.py").write_text("a = 2\n")
    assert Cells(tmp_path / "cells.json", tmp_path).get("llama", "ddp") is None


def test_the_page_tells_each_line_once(tmp_path):
    line = "key=value: is no good; use another"
    found = {
        "llama": {"ddp": Cell("ok", "", 1.0), "serve": Cell("refused", line, 1.0)},
        "opt": {"ddp": Cell("refused", line, 1.0), "serve": Cell("wrong", "differs", 1.0)},
    }
    page = tmp_path / "models.md"
    write_page(page, found, {"llama": "first", "opt": "second"})
    text = page.read_text()
    assert "| llama | first | ok | refused <sup>1</sup> |" in text
    assert "| opt | second | refused <sup>1</sup> | **WRONG** <sup>2</sup> |" in text
    assert text.count(line) == 1
