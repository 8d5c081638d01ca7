"""What a checkpoint holds of a run's logs, and what becomes of it on the next machine."""

import json

import pytest

from trainer.logs import restore_logs, save_logs


def lines(*steps, **more):
    return "".join(json.dumps({"step": step, "loss": step / 8, **more}) + "\n" for step in steps)


def steps(run_dir):
    return [json.loads(x)["step"] for x in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run_dir(tmp_path):
    """A run that logs step 5 while the checkpoint of step 4 is written."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text(lines(1, 2, 3, 5) + '{"step": 6, "lo')
    (run_dir / "events.jsonl").write_text('{"event": "start", "step": 0}\n')
    save_logs(run_dir, tmp_path / "logs", 4, {"step": 4, "loss": 0.5})
    return run_dir


def test_another_machine_has_each_step_up_to_the_checkpoint(run_dir, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    restore_logs(tmp_path / "logs", other)
    assert steps(other) == [1, 2, 3, 4]
    assert (other / "events.jsonl").read_text() == (run_dir / "events.jsonl").read_text()


def test_a_machine_that_went_on_twice_from_one_checkpoint_keeps_what_it_logged(run_dir, tmp_path):
    """The steps after the checkpoint were trained again, with other times; they count as lost."""
    again = lines(1, 2, 3, 4) + lines(5, 6, 7, elapsed_s=9)
    (run_dir / "metrics.jsonl").write_text(again)
    restore_logs(tmp_path / "logs", run_dir)
    assert (run_dir / "metrics.jsonl").read_text() == again


def test_a_machine_that_was_away_takes_the_logs_of_the_checkpoint(run_dir, tmp_path):
    (run_dir / "metrics.jsonl").write_text(lines(1, 2) + lines(3, 4, 5, elapsed_s=9))
    restore_logs(tmp_path / "logs", run_dir)
    assert steps(run_dir) == [1, 2, 3, 4]


def test_a_line_that_a_kill_has_torn_costs_no_other_line(run_dir, tmp_path):
    (run_dir / "metrics.jsonl").write_text(lines(1, 2, 3) + '{"step": 4, "lo')
    restore_logs(tmp_path / "logs", run_dir)
    found = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(found[-1]) == {"step": 4, "loss": 0.5}
