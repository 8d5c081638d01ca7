"""What is known of a folder before anything is started."""

from pathlib import Path

import pytest

from serving.artifact import Artifact, Format


def known_as(folder, format=Format.huggingface, made_of=None):
    lineage = None if made_of is None else {"parent": {"path": made_of}, "compression": {}}
    return Artifact("x", Path(folder), format, "digest", lineage).known_as


@pytest.mark.parametrize(
    ("folder", "made_of", "name"),
    [
        ("/w/runs/demo/compressed/int8/torchao", "/w/runs/demo/export", "demo"),
        ("/w/runs/demo/compressed/int8/torchao", None, "demo"),
        ("/w/compressed/int8/torchao", "/models/SmolLM2", "SmolLM2"),
        ("/w/out/torchao", "/other/runs/demo/export", "demo"),
        ("/data/demo/compressed/int8/torchao", "/data/demo/export", "demo"),
        ("/w/support-bot", "/models/SmolLM2", "support-bot"),  # it was named so
        ("/w/torchao", None, "torchao"),
    ],
)
def test_what_was_compressed_is_known_as_what_it_was_made_of(folder, made_of, name):
    assert known_as(folder, Format.torchao, made_of) == name


def test_an_export_is_known_as_its_run_and_a_folder_as_itself():
    assert known_as("/w/runs/demo/export") == "demo"
    assert known_as("/data/demo/export") == "demo"
    assert known_as("/models/SmolLM2") == "SmolLM2"
    strange = Artifact("x", Path("/w/torchao"), Format.torchao, "digest", {"parent": [1]})
    assert strange.known_as == "torchao"
