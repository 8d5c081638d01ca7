"""A user's modules in the working directory are never taken for ours."""

import os
import sys
from pathlib import Path

import pytest

from core.process import python as module
from core.process.child import run
from core.process.python import ROOT, environment, python


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A working directory and a PYTHONPATH with modules that are called as ours are."""
    for name in ("here", "path"):
        (tmp_path / name).mkdir()
        for ours in ("core", "trainer", "launch", "serving", "json"):
            (tmp_path / name / f"{ours}.py").write_text("raise SystemExit('not ours')")
    (tmp_path / "path/theirs.py").write_text("WORD = 'found'")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_a_child_finds_ours_first_and_the_users_path_after(hostile, monkeypatch):
    (hostile / "path/json.py").unlink()
    monkeypatch.setenv("PYTHONPATH", str(hostile / "path"))
    program = "import core, launch, theirs, json; print(core.__file__, theirs.WORD)"
    done = run(python("-c", program), environment())
    assert done.code == 0, done.err
    assert done.out.split() == [str(ROOT / "core/__init__.py"), "found"]


@pytest.mark.parametrize(
    ("root", "given", "expected"),
    [
        ("/ours", None, "/ours"),
        ("/ours", "", "/ours"),
        ("/ours", "/theirs:/more", "/ours:/theirs:/more"),
        ("/ours", ":/theirs", "/ours::/theirs"),
        ("/ours", "/ours:/theirs", "/ours:/theirs"),
        ("/ours", "/theirs:/ours", "/ours:/theirs:/ours"),
        # Before the standard library, other distributions would hide modules of it.
        ("/venv/site-packages", None, None),
        ("/venv/site-packages", "/theirs", "/venv/site-packages:/theirs"),
    ],
)
def test_the_search_path_of_a_child(root, given, expected, monkeypatch):
    monkeypatch.setattr(module, "ROOT", Path(root))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHONPATH", given)
    found = environment(WORD="1")
    assert found.get("PYTHONPATH") == expected
    assert found["WORD"] == "1" and "WORD" not in os.environ
    assert python("-m", "launch") == [sys.executable, "-P", "-m", "launch"]
