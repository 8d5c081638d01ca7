import json
import math

import pytest

from monitoring.jsonl import JsonlSink, encode, read_records


def steps(path):
    return [record["step"] for record in read_records(path)]


def test_floats_keep_full_precision():
    assert json.loads(encode({"step": 1, "loss": 0.1 + 0.2}))["loss"] == 0.1 + 0.2


@pytest.mark.parametrize(
    "value, text", [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")]
)
def test_numbers_that_json_lacks_become_strings_that_float_reads(value, text):
    line = encode({"step": 1, "loss": value})
    assert json.loads(line, parse_constant=pytest.fail)["loss"] == text
    assert repr(float(text)) == repr(value)


def test_every_line_is_on_disk_at_once(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl", 0)
    sink.write({"step": 1})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'
    sink.close("finished")


def test_resume_drops_later_steps_and_appends(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"step": {s}}}\n' for s in (10, 20, 30, 40)))
    sink = JsonlSink(path, 20)
    sink.write({"step": 30})
    sink.close("finished")
    assert sink.num_dropped == 2
    assert steps(path) == [10, 20, 30]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize(
    "torn", [b'{"step": 30, "lo', b'{"step": 15}', b"\x00\x00\xff", b"[1]\n", b'{"loss": 1}\n']
)
def test_resume_drops_lines_that_a_crash_left(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 10}\n' + torn)
    assert steps(path) == [10]  # a reader in the meantime leaves them out too
    JsonlSink(path, 20).close("finished")
    assert path.read_bytes() == b'{"step": 10}\n'


def test_kept_lines_are_kept_byte_for_byte(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step":10,"loss": 1.50}\n{"step":11}\n')
    JsonlSink(path, 10).close("finished")
    assert path.read_bytes() == b'{"step":10,"loss": 1.50}\n'


def test_a_run_that_starts_afresh_keeps_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 10}\n')
    JsonlSink(path, 0).close("finished")
    assert path.read_text() == ""


def test_a_crash_while_dropping_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n')

    def crash(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError):
        JsonlSink(path, 10)
    assert steps(path) == [10, 20]
