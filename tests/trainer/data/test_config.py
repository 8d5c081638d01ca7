import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from trainer.data.config import MixtureDataConfig, SingleDataConfig, SourceKind

FILES = sorted((Path(__file__).parents[3] / "configs/data").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_fits_its_schema(path, monkeypatch):
    monkeypatch.setenv("SPOTFORGE_CACHE", "/cache")
    cfg = OmegaConf.load(path)
    schema = MixtureDataConfig if path.stem == "mixture" else SingleDataConfig
    name = "mixture" if path.stem == "mixture" else "single"
    assert cfg.pop("defaults") == [f"/schema/data/{name}@_here_"]
    if "path" in cfg:
        assert OmegaConf.is_missing(cfg, "path")
        cfg.path = "x"
    data = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    assert isinstance(data, schema) and data.cache_dir == "/cache"
    assert path.stem == "mixture" or data.kind.value == path.stem
    assert f"python -m trainer data={path.stem}" in path.read_text()


def test_there_is_a_file_for_every_kind():
    assert {path.stem for path in FILES} == {kind.value for kind in SourceKind} | {"mixture"}


def test_reading_the_configuration_imports_no_heavy_library():
    heavy = "{'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)"
    code = f"import sys, trainer.data.config; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)
