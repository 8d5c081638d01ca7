"""API keys: shown once, stored as digests, gone when they are revoked."""

import json
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.errors import ConfigError
from serving.admission import KeyLimits
from serving.keys import (
    Keys,
    create,
    create_command,
    list_command,
    read_keys,
    revoke,
    revoke_command,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "conf" / "keys.json"


def test_a_created_key_is_found_and_nothing_else_is(path):
    limits = KeyLimits(requests_per_minute=60)
    alice, bob = create(path, "alice", limits), create(path, "bob", admin=True)
    keys = Keys.load(path)
    found = keys.find(f"Bearer {alice}")
    assert (found.id, found.limits, found.admin) == ("alice", limits, False)
    assert keys.find(f"bearer  {bob}").admin
    digest = json.loads(path.read_text())[0]["sha256"]
    wrong = (None, "", alice, "Bearer", "Bearer ", f"Basic {alice}", f"Bearer {alice[:-1]}")
    for header in (*wrong, f"Bearer {alice}x", f"Bearer {digest}", "Bearer \xff\udcff", "Bearer é"):
        assert keys.find(header) is None


def test_the_file_holds_no_key_and_is_its_owners_alone(path):
    old = os.umask(0)
    try:
        token = create(path, "alice")
    finally:
        os.umask(old)
    assert token.startswith("sf-") and len(token) >= 40
    assert token[3:] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (key,) = read_keys(path)
    assert key.sha256 not in repr(key)


def test_a_revoked_key_stops_working_without_a_restart(path):
    alice, bob = create(path, "alice"), create(path, "bob")
    keys = Keys.load(path)
    assert keys.find(f"Bearer {alice}")
    revoke(path, "alice")
    assert keys.find(f"Bearer {alice}") is None
    assert keys.find(f"Bearer {bob}")
    again = create(path, "alice")
    assert keys.find(f"Bearer {again}") and keys.find(f"Bearer {alice}") is None


def test_a_file_damaged_while_it_is_in_use_shuts_nobody_out(path):
    alice = create(path, "alice")
    keys, lines = Keys.load(path), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("serving.keys")
    logger.addHandler(handler)
    try:
        good = path.read_text()
        path.write_text(good[:-5])
        for _ in range(3):
            assert keys.find(f"Bearer {alice}").id == "alice"
        path.unlink()
        assert keys.find(f"Bearer {alice}")
        path.write_text("[]")
        assert keys.find(f"Bearer {alice}") is None
    finally:
        logger.removeHandler(handler)
    assert len(lines) == 2 and "is not JSON" in lines[0] and "No such file" in lines[1]


def test_a_name_is_given_once(path):
    create(path, "alice")
    before = path.read_text()
    with pytest.raises(ConfigError, match="key=alice: exists already"):
        create(path, "alice")
    with pytest.raises(ConfigError, match="key=bob: does not exist; there are: alice"):
        revoke(path, "bob")
    with pytest.raises(ConfigError, match="key='a b"):
        create(path, "a b\n")
    assert path.read_text() == before
    names = sorted(file.name for file in path.parent.iterdir())
    assert set(names) <= {"keys.json", "keys.json.lock"}


def test_commands_at_once_undo_nothing_of_each_other(path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: create(path, f"key{i}"), range(24)))
    assert {key.id for key in read_keys(path)} == {f"key{i}" for i in range(24)}


GOOD = {"id": "a", "sha256": "0" * 64, "created": "2026-11-25"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        "{}",
        "[3]",
        '"text"',
        json.dumps([{"id": "a"}]),
        json.dumps([GOOD | {"sha256": "abc"}]),
        json.dumps([GOOD | {"sha256": 3}]),
        json.dumps([GOOD | {"id": 3}]),
        json.dumps([GOOD | {"admin": "no"}]),
        json.dumps([GOOD | {"surprise": 1}]),
        json.dumps([GOOD | {"limits": 3}]),
        json.dumps([GOOD | {"limits": {"requests_per_minute": "60"}}]),
        json.dumps([GOOD | {"limits": {"requests_per_minute": -1}}]),
        json.dumps([GOOD | {"limits": {"max_concurrent": 1.5}}]),
        json.dumps([GOOD | {"limits": {"max_concurent": 1}}]),
        json.dumps([GOOD, GOOD]),
        json.dumps([GOOD, GOOD | {"id": "b"}]),
    ],
)
def test_a_damaged_file_is_one_line(path, content):
    path.parent.mkdir()
    path.write_text(content)
    for use in (Keys.load, lambda path: create(path, "b"), lambda path: revoke(path, "a")):
        with pytest.raises(ConfigError, match="keys.json: ") as caught:
            use(path)
        assert "\n" not in str(caught.value)
    assert path.read_text() == content


def test_a_file_that_is_not_text_or_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        Keys.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not JSON"):
        Keys.load(tmp_path / "binary.json")
    with pytest.raises(ConfigError, match="binary.json"):
        create(tmp_path / "binary.json" / "keys.json", "alice")


def test_the_commands(path, capsys):
    assert create_command(path, "alice", ["requests_per_minute=60", "max_concurrent=4"]) == 0
    token = capsys.readouterr().out.strip()
    assert create_command(path, "root", ["admin=true"]) == 0
    assert token not in capsys.readouterr().out
    assert Keys.load(path).find(f"Bearer {token}").limits == KeyLimits(4, 60)
    assert list_command(path) == 0
    alice, root = capsys.readouterr().out.splitlines()
    assert alice.startswith("alice  20")
    assert alice.endswith("max_concurrent=4 requests_per_minute=60")
    assert root.startswith("root") and root.endswith("admin=true")
    assert revoke_command(path, "alice") == 0
    assert Keys.load(path).find(f"Bearer {token}") is None


@pytest.mark.parametrize(
    "word",
    [
        "requests_per_minute=many",
        "requests_per_minute=0",
        "requests_per_minute=NaN",
        "tokens_per_minute",
        "max_concurrent=2.5",
        "admin=1",
        "speed=3",
    ],
)
def test_words_that_mean_nothing_are_refused_before_anything_is_written(path, word):
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        create_command(path, "alice", [word])
    assert not path.exists()
