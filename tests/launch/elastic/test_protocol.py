"""Messages survive the wire, and nothing else does."""

import pytest

from launch.elastic.protocol import (
    Dismiss,
    Hello,
    Pong,
    ProtocolError,
    RankStatus,
    Stacks,
    Start,
    Status,
    command_digest,
    decode,
    encode,
)


@pytest.mark.parametrize(
    "message",
    [
        Hello(3, 8, "ab", "10.0.0.7", "c0ffee", "beef", {"Python": "3.11"}),
        Start(3, 1, 8, 8, 16, "10.0.0.1", 40000, 1.5e9),
        Status(3, 12.5, [RankStatus(8), RankStatus(9, "train", 4, 1.5, -9, 2.5, "a\nb", "why")]),
        Stacks(["", "Thread 0x1:\n"]),
        Dismiss(33, "gone"),
        Pong(),
    ],
)
def test_a_message_comes_out_as_it_went_in(message):
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"\xff\xfe\n",
        b"[]",
        b"null",
        b'{"type": "Quit"}',
        b'{"type": ["Pong"]}',
        b'{"type": "Pong", "more": 1}',
        b'{"type": "Dismiss", "code": 0}',
        b'{"type": "Dismiss", "code": true, "reason": ""}',
        b'{"type": "Dismiss", "code": "0", "reason": ""}',
        b'{"type": "Stacks", "stacks": "text"}',
        b'{"type": "Stacks", "stacks": [1]}',
        b'{"type": "Hello", "version": 3, "nproc": 1, "command_sha256": "", "address": "", '
        b'"challenge": "", "proof": "", "software": {"torch": 2}}',
        b'{"type": "Status", "generation": 1, "clock": 1.0, "ranks": [[]]}',
        b'{"type": "Status", "generation": 1, "clock": 1.0, "ranks": [{"step": 1}]}',
        b'{"type": "RankStatus", "rank": 1}',
        b"[" * 100_000,
        b'{"type": "Dismiss", "code": ' + b"1" * 10_000 + b', "reason": ""}',
    ],
)
def test_anything_else_is_refused(line):
    with pytest.raises(ProtocolError):
        decode(line)


def test_a_digest_is_of_words_not_of_text():
    assert command_digest(["a", "b c"]) != command_digest(["a b", "c"])
