"""Stages run once and in order, go on where they stopped, and refuse what was changed between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import ConfigError, DamagedError, SpotforgeError
from launch.config import Stage as StageName
from launch.pipeline.chain import Chain
from launch.pipeline.stages import Stage, stages_of
from launch.settings import compose_settings
from tests.words import last_of_each

ROOT = Path(__file__).parents[3]
STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture(autouse=True)
def signals():
    """A chain sets handlers, which a test must not leave behind."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Site:
    def __init__(self, run_dir):
        self.run_dir = run_dir

    def stages(self, **words):
        """train -> compress -> release, each a stand-in with more words of its own."""
        stages, before = [], None
        for name, output in (("train", "export"), ("compress", "compressed"), ("release", "gate")):
            out = self.run_dir / output
            arguments = ["-S", STAND_IN, out, *(["--input", before] if before else [])]
            arguments += ["--text", name, *words.get(name, [])]
            stages.append(Stage(name, tuple(map(str, arguments)), before, out))
            before = out
        return stages

    def chain(self, **words):
        return Chain(self.stages(**words), self.run_dir / "pipeline.json")

    def run(self, only=None, **words):
        return self.chain(**words).run(only)

    def starts(self):
        """How often each was started."""
        logs = [self.run_dir / f"{name}.log" for name in ("export", "compressed", "gate")]
        return [len(log.read_text().splitlines()) if log.exists() else 0 for log in logs]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path / "run")


def test_stages_run_in_order_and_once(site, capfd):
    assert site.run() == 0
    assert (site.run_dir / "gate" / "result").read_text() == "traincompressrelease"
    assert site.run() == 0
    assert site.starts() == [1, 1, 1]
    assert "pipeline: train is done" in capfd.readouterr().err


def test_a_stopped_stage_goes_on_and_those_before_are_not_run_again(site, capfd):
    ends = dict(compress=["--ends", "33,33,0"])
    assert site.run(**ends) == 33
    assert "compress was stopped; the same command goes on" in capfd.readouterr().err
    assert site.run(**ends) == 33
    assert site.run(**ends) == 0
    assert site.starts() == [1, 3, 1]


@pytest.mark.parametrize("code", [1, 2])
def test_a_stage_that_fails_ends_the_chain_and_is_named(site, capfd, code):
    assert site.run(compress=["--ends", f"{code},0"]) == code
    assert f"compress ended with exit code {code}; nothing after it" in capfd.readouterr().err
    assert site.starts() == [1, 1, 0]
    assert site.run(compress=["--ends", f"{code},0"]) == 0


def test_another_command_runs_its_stage_and_those_after_it_again(site):
    assert site.run() == 0
    assert site.run(compress=["--text", "int8"]) == 0
    assert site.starts() == [1, 2, 2]
    assert (site.run_dir / "gate" / "result").read_text() == "trainint8release"
    # The same result: nothing after it has anything else to do
    assert site.run(train=["--ends", "0,0"], compress=["--text", "int8"]) == 0
    assert site.starts() == [2, 2, 2]


def test_what_was_changed_between_two_stages_is_refused(site):
    assert site.run(compress=["--ends", "33"]) == 33
    (site.run_dir / "export" / "result").write_text("other")
    with pytest.raises(DamagedError, match="result was changed since; restore it, or remove"):
        site.run(compress=["--ends", "33"])
    (site.run_dir / "export" / "more").write_text("")
    (site.run_dir / "export" / "result").write_text("train")
    with pytest.raises(DamagedError, match="more was added since"):
        site.run(only="compress")
    assert site.starts() == [1, 1, 0]


def test_a_result_that_was_removed_is_made_again(site):
    assert site.run() == 0
    (site.run_dir / "compressed" / "result").unlink()
    (site.run_dir / "compressed").rmdir()
    assert site.run() == 0
    assert site.starts() == [1, 2, 1]  # the same bytes: release has nothing to do


def test_one_stage_alone(site):
    with pytest.raises(ConfigError, match="launch.stages=compress: .*export"):
        site.run(only="compress")
    for name in ("train", "compress", "release"):
        assert site.run(only=name) == 0
    assert site.starts() == [1, 1, 1]


def test_a_stage_without_a_result_has_failed(site):
    stage = Stage("train", ("-c", "pass"), None, site.run_dir / "export")
    with pytest.raises(SpotforgeError, match="^train .*/export"):
        Chain([stage], site.run_dir / "pipeline.json").run()


def test_a_state_that_cannot_be_is_refused(site):
    assert site.run() == 0
    path = site.run_dir / "pipeline.json"
    for text in (path.read_text()[:50], '{"stages": {"train": {}}}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(DamagedError, match="cannot be read; remove it"):
            site.run()
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedError, match="cannot be read; remove it"):
        site.run()


def test_the_run_directory_may_be_mounted_elsewhere(site):
    assert site.run(compress=["--ends", "33"]) == 33
    moved = Site(site.run_dir.rename(site.run_dir.with_name("moved")))
    (moved.run_dir / "export" / "result").write_text("other")
    with pytest.raises(DamagedError, match="result was changed"):
        moved.run(only="compress")


def test_a_signal_reaches_the_stage_and_no_other_is_started(site):
    code = (
        "import sys; from pathlib import Path\n"
        "from launch.pipeline.chain import Chain; from launch.pipeline.stages import Stage\n"
        f"run = Path({str(site.run_dir)!r}); out = run / 'export'\n"
        f"a = Stage('train', ({str(STAND_IN)!r}, str(out), '--wait'), None, out)\n"
        "b = Stage('release', ('-c', 'raise SystemExit(5)'), out, None)\n"
        "sys.exit(Chain([a, b], run / 'pipeline.json').run())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not site.run_dir.exists() or site.starts()[0] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 33 and "train was stopped" in said


# The real programs


def test_the_trainer_is_the_first_stage(tmp_path):
    words = [f"run.dir={tmp_path / 'run'}", "model=tiny", "data=stdlib", "stop.steps=3"]
    (stage,) = stages_of(compose_settings(words), tmp_path)
    assert stage.arguments == ("-m", "trainer", f"--config-dir={tmp_path}", *words)
    assert stage.output == tmp_path / "run" / "export"


def test_stages_follow_one_another(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in ("compression", "release"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    run = tmp_path / "run"
    words = [f"run.dir={run}", "launch.stages=[train,compress,release]"]
    train, compress, release = stages_of(compose_settings(words))
    assert (train.input, compress.input, release.input) == (None, train.output, compress.output)
    assert compress.arguments == ("-m", "compression", f"run={run}")
    assert release.arguments == ("-m", "release", f"run={run}")
    assert release.output == run / "gate.json"
    for more, said in (
        (["launch.stages=[compress,train]"], r"launch.stages=\[compress,train\]: .*; use"),
        (["launch.stages=[compress]"], r"launch.stages=\[compress\]: .*export"),
        (["export.at_end=false"], "export.at_end=False: compress reads the export"),
    ):
        with pytest.raises(ConfigError, match=said):
            stages_of(compose_settings(last_of_each([*words, *more])))


def test_a_stage_that_was_run_by_other_means_is_recorded(site):
    with pytest.raises(SpotforgeError, match="^train .*/export"):
        site.chain().record("train")
    (site.run_dir / "export").mkdir(parents=True)
    (site.run_dir / "export" / "result").write_text("of a job elsewhere")
    site.chain().record("train")
    assert site.run(only="compress") == 0
    assert site.starts() == [0, 1, 0]
    (site.run_dir / "export" / "result").write_text("other")
    with pytest.raises(DamagedError, match="result was changed"):
        site.run(only="compress")


@pytest.mark.parametrize("option", ["--only", "--record"])
def test_a_stage_that_is_not_named_is_refused(small, option, capsys):
    from launch.__main__ import main

    assert main(["pipeline", option, "compress", *small]) == 2
    assert f"{option}=compress: not in launch.stages" in capsys.readouterr().err


@pytest.mark.parametrize("name", [StageName.compress, StageName.release])
def test_a_stage_that_this_version_lacks_is_refused(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        stages_of(compose_settings([f"launch.stages=[{name.value}]"]))
    package = {"compress": "compression", "release": "release"}[name.value]
    assert str(refused.value) == (
        f"launch.stages=[{name.value}]: this version has no python -m {package}; "
        f"leave out {name.value}"
    )


def test_a_real_run_is_the_first_stage_and_is_not_run_twice(small, tmp_path):
    words = last_of_each([*small, "export.at_end=true"])

    def pipeline():
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "launch", "pipeline", *words],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("SKYPILOT")},
            capture_output=True,
            text=True,
        )

    first = pipeline()
    assert first.returncode == 0, first.stderr
    state = json.loads((tmp_path / "run" / "pipeline.json").read_text())
    assert "model.safetensors" in state["stages"]["train"]["output"]
    metrics = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    second = pipeline()
    assert (second.returncode, second.stderr) == (0, "pipeline: train is done\n")
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == metrics
