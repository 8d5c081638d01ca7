import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from core.errors import ConfigError, DamagedError
from monitoring.report import main, write_report

HOSTILE = "<script>alert(1)</script> \"quoted\" & '</p>'"


def write_run(run_dir, num_records=60):
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "metrics.jsonl").open("w") as lines:
        for i in range(1, num_records + 1):
            record = {"step": i * 10, "loss": 3 + 7 / i, "lr": 3e-4 / i, "grad_norm": 1 + 1 / i}
            record |= {"tokens_per_s": 8000.0 + i % 7, "step_s": 0.5, "data_wait_s": 0.01}
            record |= {"peak_memory_bytes": 2**31, "num_tokens": i * 4000, "elapsed_s": i * 5.0}
            if i % 10 == 0:
                record |= {"validation_loss": 3.1 + 7 / i, "validation_bits_per_byte": 1.0 + 1 / i}
            lines.write(json.dumps(record) + "\n")
    return run_dir


def write_everything(run_dir):
    write_run(run_dir)
    samples = [{"step": s, "prompt": "In <b>", "text": f"{HOSTILE} {s}"} for s in range(0, 300, 10)]
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    status = {"status": "stopped", "run_name": HOSTILE, "total_steps": 600, "num_parameters": 12345}
    (run_dir / "status.json").write_text(json.dumps(status))
    config = {"seed": 1, "model": {"rope": {"theta": 7}, "x": HOSTILE}}
    (run_dir / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    file = {"path": f"/d/{HOSTILE}", "size_bytes": 2**30, "sha256": "ab" * 32}
    source = {"name": HOSTILE, "kind": "text", "num_tokens": 1_200_000, "files": [file] * 50}
    (run_dir / "data.json").write_text(json.dumps({"digest": "cd" * 32, "sources": [source]}))
    environment = {
        "gpus": [{"name": "NVIDIA H200", "memory_bytes": 2**37}],
        "git": {"commit": "f" * 40, "dirty": True},
        "packages": {"torch": HOSTILE},
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))
    for step in (10, 20):
        (run_dir / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (run_dir / "checkpoints/LATEST").write_text("step-00000020\n")
    return run_dir


class Page(HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def report(run_dir):
    return write_report(run_dir).read_text()


def assert_self_contained(text):
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    targets = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "srcset")]
    assert all(target.startswith("#") for target in targets)
    assert not re.findall(r"url\((?!#)", text) and "@import" not in text
    assert not re.findall(r"https?://", text)
    ids = [v for k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids))


def test_everything_is_shown_and_escaped(tmp_path):
    text = report(write_everything(tmp_path / "run"))
    assert_self_contained(text)
    page = Page(text)
    assert "<script" not in text
    assert f"In <b>{HOSTILE} 290" in page.text  # the last sample, as text
    assert page.text.count(HOSTILE) >= 5
    for shown in (
        "stopped, can be resumed",
        "600 of 600 steps on 1 x NVIDIA H200",
        "rope.theta",
        "5m00s",
    ):
        assert shown in page.text
    for shown in ("12.3k", "1.2M", "and 10 more in data.json", "f" * 40 + " + changes", "latest"):
        assert shown in page.text
    assert any(k == "title" and "ab" * 32 in v for k, v in page.attributes)
    assert page.tags.count("svg") == 8  # the loss in two sizes, and six others


def test_only_metrics(tmp_path):
    text = report(write_run(tmp_path / "run"))
    assert_self_contained(text)
    page = Page(text)
    assert "status unknown" in page.text and "Generated text" not in page.text
    assert "MFU" not in page.text


def test_nothing_logged_yet(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    text = report(tmp_path)
    assert_self_contained(text)
    assert "Nothing has been logged yet." in text and "<svg" not in text


def test_one_record(tmp_path):
    assert "<svg" in report(write_run(tmp_path / "run", 1))


def test_a_record_of_nothing_but_a_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "<svg" not in report(tmp_path)


def test_numbers_that_are_not_finite_are_told_apart(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "NaN"}, {"step": 3, "loss": "Infinity"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    text = report(tmp_path)
    assert "loss was not finite at 2 logged step(s), first at step 2." in text


def test_resumes_are_marked(tmp_path):
    lines = [{"step": s, "loss": 1.0, "elapsed_s": s, "resumed": s == 2} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    text = report(tmp_path)
    assert "1 resume<" in text and ">resumed<" in text


def test_a_page_of_many_records_stays_small(tmp_path):
    run_dir = write_everything(tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("w") as lines:
        for s in range(1, 20_001):
            noise = math.sin(s * 12.9898) * 43758.5453 % 1
            keys = ("loss", "validation_loss", "grad_norm", "tokens_per_s", "step_s", "mfu", "lr")
            record = {"step": s, **{key: 1 + noise for key in keys}, "data_wait_s": noise}
            lines.write(json.dumps(record) + "\n")
    text = report(run_dir)
    assert len(text) < 2_000_000
    longest = max(text.split('d="'), key=lambda path: path.partition('"')[0].count("L"))
    assert longest.partition('"')[0].count("L") <= 2_000


def test_slow_links_are_shown_as_last_measured_the_slowest_first(tmp_path):
    write_run(tmp_path)
    shared = {"event": "slow", "step": None, "others_mbit_per_s": 940.2, "target": "node a"}
    events = [
        {**shared, "source": f"node b{HOSTILE}", "mbit_per_s": 40.0},
        {**shared, "source": "node c", "mbit_per_s": 7.3},
        {"event": "start", "step": None, "reason": "start 1: 3 ranks"},
        {**shared, "source": f"node b{HOSTILE}", "mbit_per_s": 0.94},
        {"event": "slow", "reason": "of a version that wrote no figures"},
    ]
    (tmp_path / "supervisor.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    text = report(tmp_path)
    assert_self_contained(text)
    shown = Page(text).text
    first = f"node b{HOSTILE} -> node a0.9 Mbit/sothers 9402 x"  # cells, one after another
    assert shown.index(first) < shown.index("node c -> node a7.3 Mbit/sothers 9401 x")
    assert "40.0" not in shown


def test_without_slow_links_there_is_no_table_of_them(tmp_path):
    assert "Slow links" not in report(write_run(tmp_path))


@pytest.mark.parametrize("data", [[], {"sources": None}, {"sources": [{}, 3]}, {"a": {"b": 1}}])
def test_data_of_another_shape(tmp_path, data):
    write_run(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(data))
    assert_self_contained(report(tmp_path))


@pytest.mark.parametrize("name", ["data.json", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path, name):
    write_run(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(DamagedError, match=name):
        write_report(tmp_path)


def test_same_run_same_page(tmp_path):
    write_everything(tmp_path / "run")
    assert report(tmp_path / "run") == report(tmp_path / "run")


def test_a_folder_that_is_no_run(tmp_path, capsys):
    with pytest.raises(ConfigError):
        write_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl" in line and str(tmp_path) in line


def test_command_line(tmp_path):
    write_run(tmp_path, 3)
    command = [sys.executable, "-m", "monitoring.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "report.html")
