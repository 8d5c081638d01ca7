"""What an engine is told of the artifact and of this host's memory."""

import asyncio
import json
from pathlib import Path

import pytest

from serving.artifact import resolve
from serving.config import EngineConfig, EngineDtype, EngineName
from serving.engines import selection
from tests.serving.conftest import save_model

NUMBERS_OF_A_TOKEN = 2 * 2 * 2 * 16  # keys and values, layers, heads, width of a head


def build(folder, config):
    return asyncio.run(selection.build(resolve(str(folder)), config, Path("unused"), {}))[0]


@pytest.mark.parametrize(
    ("dtype", "quantization", "asked", "has_gpu", "itemsize"),
    [
        ("bfloat16", None, "auto", False, 4),  # on a CPU all formats are computed in float32
        ("bfloat16", "torchao", "auto", False, 4),
        ("bfloat16", "compressed-tensors", "auto", False, 4),
        ("bfloat16", None, "auto", True, 2),
        ("bfloat16", "torchao", "auto", True, 2),
        ("float32", None, "auto", True, 4),
        ("float32", None, "bfloat16", False, 2),
    ],
)
def test_megabytes_of_a_kv_cache_are_of_the_type_it_is_in(
    tmp_path, monkeypatch, dtype, quantization, asked, has_gpu, itemsize
):
    monkeypatch.setattr(selection, "ProcessEngine", lambda command, _: json.loads(command[-1]))
    monkeypatch.setattr(selection.gpus, "has_gpu", lambda: has_gpu)
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": dtype}
    if quantization is not None:
        config["quantization_config"] = {"quant_method": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name, dtype = EngineName.transformers, EngineDtype(asked)
    told = build(tmp_path, EngineConfig(name=name, kv_cache_mb=1, dtype=dtype))
    assert told["kv_cache_tokens"] == 10**6 // (NUMBERS_OF_A_TOKEN * itemsize)


def test_of_openvino_likewise(export, monkeypatch):
    monkeypatch.setattr(selection, "ProcessEngine", lambda command, _: command)
    monkeypatch.setattr(selection.openvino, "prepare", lambda *_: export)
    monkeypatch.setattr(selection.openvino, "command", lambda _, **settings: settings)
    told = build(export, EngineConfig(name=EngineName.openvino, kv_cache_mb=1))
    assert 0.999e6 < told["kv_cache_bytes"] <= 1e6
