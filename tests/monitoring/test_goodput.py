import json

import pytest

from monitoring.goodput import goodput
from monitoring.run_files import read_run

PARTS = (
    *("useful_s", "starting_s", "saving_s", "evaluation_s"),
    *("lost_s", "ending_s", "waiting_s", "other_s"),
)


def account(folder, events, records):
    for name, rows in (("metrics", records), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = goodput(read_run(folder))
    assert found is not None
    parts = {name: getattr(found, name) for name in PARTS}
    assert sum(parts.values()) == pytest.approx(found.wall_s, abs=1e-9)
    return found, {name: round(value, 6) for name, value in parts.items() if abs(value) > 1e-9}


def event(time, kind, step, **details):
    return {"time": time, "event": kind, "step": step, **details}


def start(time, step, startup_s=5.0, lost_steps=0):
    return event(time, "start", step, startup_s=startup_s, lost_steps=lost_steps)


def record(step, elapsed_s, step_s=2.0, **more):
    return {"step": step, "step_s": step_s, "elapsed_s": elapsed_s, **more}


def steps(first, last, elapsed_s, step_s=2.0):
    """One record a step; `elapsed_s` is when the first began."""
    numbers = range(first, last + 1)
    return [record(n, elapsed_s + step_s * (n - first + 1), step_s) for n in numbers]


def test_a_run_that_kept_no_events(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1, 2.0)) + "\n")
    assert goodput(read_run(tmp_path)) is None


def test_an_uninterrupted_run(tmp_path):
    events = [
        start(105, 0),
        event(127, "checkpoint", 10, blocking_s=1.0),
        event(155, "checkpoint", 20, blocking_s=0.5),
        event(160, "finish", 20),
    ]
    # Evaluates for 3 s after step 10, then saves; logs every 5 steps
    records = [
        *(record(5, 10.0), record(10, 20.0, validation_loss=1.0)),
        *(record(15, 34.0, checkpoint_blocking_s=1.0), record(20, 44.0)),
    ]
    found, parts = account(tmp_path, events, records)
    assert parts == {
        **{"useful_s": 40.0, "starting_s": 5.0, "saving_s": 1.5, "evaluation_s": 3.0},
        "ending_s": 10.5,  # from 149, less the last save
    }
    assert (found.wall_s, found.share) == (60.0, pytest.approx(40 / 60))
    assert (found.num_starts, found.num_losses, found.lost_steps) == (1, 0, 0)


def test_an_evaluation_before_the_first_step(tmp_path):
    # Killed after two steps, then from the beginning again; evaluates for 3 s each time
    events = [start(105, 0), start(115, 0, lost_steps=2), event(140, "finish", 10)]
    records = [record(0, 0.0, 0.0, validation_loss=5.0), *steps(1, 10, 3)]
    _, parts = account(tmp_path, events, records)
    assert parts == {
        **{"useful_s": 20.0, "starting_s": 10.0, "evaluation_s": 3.0},
        **{"lost_s": 4.0, "waiting_s": 1.0, "ending_s": 2.0},
    }


def test_a_run_that_was_killed_twice(tmp_path):
    events = [
        start(105, 0),
        event(127, "checkpoint", 10, blocking_s=1.0),
        start(205, 10, lost_steps=3),
        start(305, 10, lost_steps=6),
        event(330, "finish", 20),
    ]
    found, parts = account(tmp_path, events, [*steps(1, 10, 0), *steps(11, 20, 20)])
    assert parts == {
        "useful_s": 40.0,
        "starting_s": 15.0,
        "saving_s": 1.0,
        "lost_s": 18.0,
        "waiting_s": (200 - 132) + (300 - 217),  # the deaths: after 3 and 6 steps of 2 s
        "ending_s": 5.0,
    }
    assert (found.num_starts, found.num_losses, found.lost_steps) == (3, 2, 9)


def test_lost_steps_fit_between_the_last_sign_and_the_next_start(tmp_path):
    events = [start(105, 0), start(114, 0, lost_steps=100), event(134, "finish", 10)]
    found, parts = account(tmp_path, events, steps(1, 10, 0))
    assert parts == {"useful_s": 20.0, "starting_s": 10.0, "lost_s": 4.0}
    assert found.lost_steps == 100


def test_a_graceful_stop_between_two_records(tmp_path):
    # Logs every 10 steps; stops after 13, which are all saved
    events = [
        start(105, 0),
        event(132, "checkpoint", 13, blocking_s=1.0),
        event(133, "stop", 13, reason="SIGTERM"),
        start(150, 13),
        event(165, "finish", 20),
    ]
    found, parts = account(tmp_path, events, [record(10, 20.0), record(20, 40.0)])
    assert parts == {
        "useful_s": 40.0,
        "starting_s": 10.0,
        "saving_s": 1.0,
        "ending_s": 2.0,  # after 105 + 26 + 1, and after 150 + 14
        "waiting_s": 12.0,
    }
    assert (found.num_starts, found.num_losses, found.lost_steps) == (2, 0, 0)


def test_a_failure_and_the_steps_that_it_cost(tmp_path):
    events = [
        start(105, 0),
        event(126, "checkpoint", 10, blocking_s=0.0),
        event(135, "fail", 0, error="DivergedError: ..."),
        start(145, 10, lost_steps=4),
        event(165, "finish", 20),
    ]
    found, parts = account(tmp_path, events, [*steps(1, 10, 0), *steps(11, 20, 20)])
    assert parts == {
        **{"useful_s": 40.0, "starting_s": 10.0, "lost_s": 8.0},
        **{"ending_s": 2.0, "waiting_s": 5.0},
    }
    assert (found.num_losses, found.lost_steps) == (0, 4)


def test_a_rollback(tmp_path):
    # From 10 back to 8: two steps lost, the batch of the third, and 3 s to load
    events = [
        start(105, 0),
        event(128, "rollback", 10, to_step=8, loss=9.0, reason="..."),
        event(142, "finish", 12),
    ]
    records = [*steps(1, 8, 0), record(9, 27.0, step_s=7.0), *steps(10, 12, 27)]
    found, parts = account(tmp_path, events, records)
    assert parts == {
        **{"useful_s": 24.0, "starting_s": 5.0, "lost_s": 4.0},
        **{"ending_s": 4.0, "other_s": 5.0},
    }
    assert (found.lost_steps, found.skipped_batches, found.num_losses) == (2, 1, 0)


def test_a_skipped_batch_is_no_useful_time(tmp_path):
    events = [start(105, 0), event(111, "skip", 2, loss=9.0, reason=""), event(115, "finish", 4)]
    records = [*steps(1, 2, 0), record(3, 8.0, step_s=4.0), record(4, 10.0)]
    found, parts = account(tmp_path, events, records)
    assert parts == {"useful_s": 8.0, "starting_s": 5.0, "other_s": 2.0}
    assert found.skipped_batches == 1


def test_a_run_that_is_running_ends_at_its_last_sign(tmp_path):
    found, parts = account(tmp_path, [start(105, 0)], steps(1, 3, 0))
    assert parts == {"useful_s": 6.0, "starting_s": 5.0}
    events = [start(105, 0), event(120, "checkpoint", 2, blocking_s=1.0)]
    found, parts = account(tmp_path, events, steps(1, 3, 0))
    assert parts == {"useful_s": 6.0, "starting_s": 5.0, "saving_s": 1.0, "other_s": 8.0}
    assert found.num_losses == 0


def test_going_back_to_an_older_checkpoint(tmp_path):
    events = [
        *(start(105, 0), event(125, "stop", 10), start(135, 10), event(155, "stop", 20)),
        *(start(165, 5, lost_steps=15), event(195, "finish", 20)),
    ]
    found, parts = account(tmp_path, events, [*steps(1, 5, 0), *steps(6, 20, 10)])
    assert parts["useful_s"] == 40.0 and parts["lost_s"] == 20.0  # the second start, all of it
    assert found.lost_steps == 15


def test_steps_from_before_there_were_events_are_left_out(tmp_path):
    events = [start(105, 10), event(125, "finish", 20)]
    found, parts = account(tmp_path, events, [*steps(1, 10, 0), *steps(11, 20, 20)])
    assert parts == {"useful_s": 20.0, "starting_s": 5.0}


def test_numbers_that_are_none(tmp_path):
    events = [start(105, 0), event(110, "checkpoint", 2), event(112, "finish", 2)]
    found, parts = account(tmp_path, events, [{"step": 1}, {"step": 2, "step_s": "NaN"}])
    assert parts == {"starting_s": 5.0, "ending_s": 7.0}
    found, parts = account(tmp_path, [{"step": 0, "event": "start"}], [])
    assert (parts, found.share) == ({}, 0.0)


def test_a_start_on_a_machine_whose_clock_is_an_hour_behind(tmp_path):
    """Killed after 5 steps; nothing takes a negative time."""
    events = [start(4000, 0), start(420, 5), event(432, "finish", 10)]
    found, parts = account(tmp_path, events, [*steps(1, 5, 0), *steps(6, 10, 10)])
    assert parts == {"useful_s": 20.0, "starting_s": 10.0, "ending_s": 2.0}
    assert found.wall_s == 32.0
