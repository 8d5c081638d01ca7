"""What is known of a folder before anything is started."""

import json
from pathlib import Path

import pytest

from compression.targets.packing import load_folder
from core.errors import ConfigError
from serving.artifact import Artifact, Format, resolve
from tests.families import zoo


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


def folder_of(path, files=(), **config):
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    for name in files:
        (path / name).write_bytes(b"{}")
    return str(path)


def test_what_no_engine_loads_is_refused_with_what_helps(tmp_path):
    fp8 = folder_of(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigError, match="quantized by fp8.*; .*dequantize it"):
        resolve(fp8)
    with pytest.raises(ConfigError, match="no weights .*; export it again"):
        resolve(folder_of(tmp_path))
    with pytest.raises(ConfigError, match=r"pytorch_model.bin.*; .*save it again"):
        resolve(folder_of(tmp_path, ["pytorch_model.bin"]))
    assert resolve(folder_of(tmp_path, ["model.gguf"])).format is Format.gguf


def test_a_vocabulary_that_was_enlarged_by_hand_is_told_as_such(tmp_path):
    folder = zoo.build("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    for key, said in (("vocab_size", "set vocab_size=264"), ("hidden_size", "export or compress")):
        changed = config | {key: config[key] - 8}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=said):
            load_folder(folder)
