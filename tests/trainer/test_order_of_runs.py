"""A run goes on with the order of samples that it began with, on any Python."""

import json

import pytest

pytest.importorskip("torch")

from core.errors import ConfigError
from core.folder import sha256_of
from trainer.checkpoint import TrainerState, committed, read_state
from trainer.data import loader
from trainer.data.order import OrderRule
from trainer.resume import order_of


def change_state(checkpoint, change):
    """Edits trainer.json, and the manifest that vouches for it."""
    path, manifest = checkpoint / "trainer.json", checkpoint / "manifest.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    listed = json.loads(manifest.read_text())
    listed["files"]["trainer.json"] = {
        "size_bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }
    manifest.write_text(json.dumps(listed))


@pytest.mark.long
def test_a_run_from_before_rules_had_names_keeps_the_sum_of_its_python(
    trainer, small, corpus, tmp_path, monkeypatch
):
    """Begun under Python 3.13, it goes on under this one, twice."""
    rules, run = [], tmp_path / "run"
    real = loader.SampleOrder

    def spied(*arguments):
        rules.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(loader, "SampleOrder", spied)
    source = f"{{kind: text, path: {corpus}, weight: %s}}"
    sources = ", ".join(f"{name}: {source % w}" for name, w in (("a", 0.6), ("b", 0.3), ("c", 0.1)))
    mixed = [word for word in small if not word.startswith(("data=", "data.path", "stop"))]
    mixed += ["data=mixture", f"+data.sources={{{sources}}}", "evaluation.max_samples=1"]
    mixed += ["monitoring.report=false", "export.at_end=false"]
    assert trainer(*mixed, "stop.steps=1", "schedule=constant").code == 0
    assert read_state(committed(run / "checkpoints")[0]).order is OrderRule.exact

    change_state(committed(run / "checkpoints")[0], lambda state: state.pop("order"))
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"python": "3.13.0"}))
    described = json.loads((run / "data.json").read_text())
    assert described.pop("order") == "exact"
    (run / "data.json").write_text(json.dumps(described))
    result = trainer(*mixed, "stop.steps=2", "schedule=constant")
    assert result.code == 0 and "names no order of samples; using compensated" in result.out
    assert json.loads((run / "environment.json").read_text())["python"] == environment["python"]
    assert read_state(committed(run / "checkpoints")[0]).order is OrderRule.compensated
    assert rules == [OrderRule.exact, OrderRule.compensated]


@pytest.mark.parametrize(
    "stored, data, environment, rule",
    [
        ("exact", '{"order": "compensated"}', '{"python": "3.11.7"}', "exact"),
        (None, '{"order": "compensated"}', '{"python": "3.11.7"}', "compensated"),
        (None, "{}", '{"python": "3.11.7"}', "left-to-right"),
        (None, "{}", '{"python": "3.12.1"}', "compensated"),
        (None, '{"order": "comp', '{"python": "3.13.0rc1"}', "compensated"),
        (None, None, '{"python": "', "left-to-right"),
        (None, None, None, "left-to-right"),
    ],
)
def test_where_the_rule_of_a_run_is_found(tmp_path, stored, data, environment, rule):
    for name, content in (("data.json", data), ("environment.json", environment)):
        if content is not None:
            (tmp_path / name).write_text(content)
    named = None if stored is None else OrderRule(stored)
    assert order_of(TrainerState(1, 8, 256, 0.0, "", "", {}, named), tmp_path) == rule


def test_a_rule_that_is_not_known_is_refused(tmp_path):
    (tmp_path / "trainer.json").write_text(json.dumps({"step": 1, "order": "alphabetical"}))
    with pytest.raises(ConfigError, match="the rule 'alphabetical', which this version"):
        read_state(tmp_path)
