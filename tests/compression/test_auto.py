"""recipe=auto: never slower than the parent, and what could not be tried says why."""

import json

import pytest

from compression.targets.openvino_program import PYTHON


@pytest.fixture
def measured(monkeypatch):
    """What a clock would say, by target: (decode over the parent's, perplexity ratio)."""
    figures = {}

    def read_report(artifact):
        report = json.loads((artifact / "compression.json").read_text())
        faster, ratio = figures[artifact.name]
        report["speed"]["child"]["decode_tokens_per_s"] = (
            report["speed"]["parent"]["decode_tokens_per_s"] * faster
        )
        report["evaluation"]["perplexity_ratio"]["mean"] = ratio
        return report

    monkeypatch.setattr("compression.auto.read_report", read_report)
    monkeypatch.delenv(PYTHON, raising=False)
    return figures


def auto(compress, parent, *words):
    return compress(f"model={parent}", "recipe=auto", "target=cpu", "out=x", *words)


def test_without_openvino_it_says_so_and_takes_what_is_there(compress, parent, measured, tmp_path):
    measured["torchao"] = (1.3, 1.001)
    code, out, err = auto(compress, parent)
    assert code == 0, err
    told = json.loads((tmp_path / "x" / "auto.json").read_text())
    assert told["picked"] == {"recipe": "int8_weight_only", "target": "torchao"}
    assert "make test-openvino" in told["candidates"][0]["why_not"]
    assert (tmp_path / "x" / "torchao" / "config.json").is_file()
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["auto.json", "torchao"]
    assert auto(compress, parent)[0] == 0  # again


@pytest.mark.parametrize(
    ("figures", "why"), [((0.9, 1.0), "not faster than the parent"), ((2.0, 1.3), "perplexity")]
)
def test_nothing_is_picked_that_is_slower_or_worse(
    figures, why, compress, parent, measured, tmp_path
):
    measured["torchao"] = figures
    code, out, err = auto(compress, parent)
    assert code == 0 and "keep the parent" in out, err
    told = json.loads((tmp_path / "x" / "auto.json").read_text())
    assert told["picked"] is None and why in told["candidates"][-1]["why_not"]
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["auto.json"]


def test_what_the_gate_refuses_is_not_picked(compress, parent, measured, tmp_path):
    code, out, err = auto(compress, parent, "gate.max_kl=1e-9")
    assert code == 0 and "keep the parent" in out, err
    told = json.loads((tmp_path / "x" / "auto.json").read_text())
    assert told["picked"] is None
    why = told["candidates"][-1]["why_not"]
    assert why.startswith("gate.max_kl=1e-09: kl_nats fails") and "rejected.json" not in why
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["auto.json"]


def test_auto_stands_alone(compress, parent):
    code, _, err = compress(f"model={parent}", "recipe=[auto,int8_weight_only]", "target=cpu")
    assert code == 2 and "recipe=auto+int8_weight_only: " in err
    code, _, err = compress(f"model={parent}", "recipe=auto", "target=torchao")
    assert code == 2 and "use recipe=auto target=cpu" in err
    code, _, err = compress(f"model={parent}", "target=cpu")
    assert code == 2 and "use recipe=auto target=cpu" in err
