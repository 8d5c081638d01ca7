"""What is not good enough does not take its place."""

import json

import pytest

from compression.config import GateConfig
from compression.gate import failures

EVALUATION = {
    "perplexity_ratio": {"mean": 1.05, "low": 1.02, "high": 1.08},
    "kl_nats": {"mean": 0.10, "low": 0.08, "high": 0.12},
    "greedy_agreement": {"mean": 0.90, "low": 0.88, "high": 0.92},
}


@pytest.mark.parametrize(
    ("limits", "failed"),
    [
        ({}, []),
        ({"max_perplexity_ratio": 1.08, "max_kl": 0.12, "min_greedy_agreement": 0.88}, []),
        ({"max_perplexity_ratio": 1.06}, ["gate.max_perplexity_ratio=1.06"]),  # above the mean
        ({"max_kl": 0.11}, ["gate.max_kl=0.11"]),
        ({"min_greedy_agreement": 0.89}, ["gate.min_greedy_agreement=0.89"]),
        (
            {"max_kl": 0.01, "min_greedy_agreement": 0.99},
            ["gate.max_kl=0.01", "gate.min_greedy_agreement=0.99"],
        ),
    ],
)
def test_the_worse_end_of_the_interval_is_held_to_the_limit(limits, failed):
    found = failures(GateConfig(**limits), EVALUATION)
    assert [line.partition(":")[0] for line in found] == failed


def test_without_an_interval_nothing_passes():
    evaluation = EVALUATION | {"kl_nats": {"mean": 0.1, "low": None, "high": None}}
    assert failures(GateConfig(max_perplexity_ratio=2.0), evaluation) == []
    (line,) = failures(GateConfig(max_kl=9.0), evaluation)
    assert "leaves no interval" in line


def test_a_result_that_fails_leaves_its_report_and_no_artifact(compress, parent, tmp_path):
    words = [f"model={parent}", "recipe=[prune_magnitude,int8_weight_only]", "out=x"]
    words.append("evaluation.speed=false")
    place, rejected = tmp_path / "x/compressed_tensors", tmp_path / "x/rejected.json"
    assert compress(*words, "gate.max_kl=100")[0] == 0
    assert place.is_dir() and not rejected.exists()
    code, out, err = compress(*words, "gate.max_kl=1e-6", "gate.min_greedy_agreement=1e-6")
    lines = [line for line in err.splitlines() if ": block " not in line]
    assert code == 1 and len(lines) == 1 and out == "", err
    assert lines[0].startswith("gate.max_kl=1e-06: kl_nats fails: it is ")
    assert not place.exists()
    report = json.loads(rejected.read_text())
    assert report["evaluation"]["kl_nats"]["high"] > 1e-6 and len(report["failed"]) == 1
    code, _, err = compress(*words, "gate.max_kl=100")  # judged anew, not computed again
    assert code == 0 and "going on after block 3 of 3" in err
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["compressed_tensors"]


@pytest.mark.parametrize(
    "word", ["gate.max_kl=-1", "gate.max_perplexity_ratio=nan", "gate.min_greedy_agreement=1.5"]
)
def test_limits_that_cannot_be_are_refused(word, compress, parent, tmp_path):
    code, _, err = compress(f"model={parent}", word, "out=x")
    assert code == 2 and word in err and not (tmp_path / "x").exists()
