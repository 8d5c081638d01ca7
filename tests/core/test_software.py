"""Two machines that run the same have the same words for it."""

import shutil
from importlib import metadata

import pytest

from core import software as module
from core.software import CODE, code_digest, difference, software


def test_what_is_installed_is_told_without_an_import():
    versions = software()
    assert versions["numpy"] == metadata.version("numpy")
    assert versions[CODE] == code_digest()[:12]


@pytest.mark.parametrize("change", ["edit", "add", "rename"])
def test_any_change_of_the_code_changes_its_digest(monkeypatch, tmp_path, change):
    copy = tmp_path / "core"
    shutil.copytree(module.ROOT / "core", copy)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    before = code_digest()
    (copy / "notes.txt").write_text("no module")
    assert code_digest() == before
    if change == "edit":
        (copy / "layout.py").write_text((copy / "layout.py").read_text() + "# more\n")
    elif change == "add":
        (copy / "more.py").touch()
    else:
        (copy / "layout.py").rename(copy / "names.py")
    assert code_digest() != before


def test_only_what_differs_is_named():
    expected = {"Python": "3.11", "torch": "2.13.0", "numpy": "2.4.6", "deepspeed": "0.19.8"}
    found = {"Python": "3.11", "torch": "2.12.0", "numpy": "2.4.6"}
    assert difference(expected, expected) is None
    assert difference(found, expected) == (
        "torch 2.12.0, no deepspeed",
        "torch 2.13.0, deepspeed 0.19.8",
    )
    assert difference(expected, found) == (
        "torch 2.13.0, deepspeed 0.19.8",
        "torch 2.12.0, no deepspeed",
    )
