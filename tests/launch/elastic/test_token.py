"""Who lacks the supervisor's token cannot join, and who lacks the machine's is not obeyed."""

import hashlib
import hmac
import json
import re
import socket
import stat
from contextlib import suppress

import pytest

from core.errors import ConfigError
from core.software import software
from launch.elastic.protocol import VERSION, command_digest
from launch.elastic.token import is_proof, new_token, proof_of, read_token
from tests.launch.elastic.conftest import LONG

TOKEN = "correct horse battery staple"


def test_a_proof_is_an_hmac_of_both_challenges():
    text = b"machine\n0a\n0b\n2"
    expected = hmac.new(TOKEN.encode(), text, hashlib.sha256).hexdigest()
    assert proof_of(TOKEN, "machine", "0a", "0b", 2) == expected
    assert is_proof(expected, TOKEN, "machine", "0a", "0b", 2)


@pytest.mark.parametrize(
    ("role", "parts"),
    [("supervisor", ("0a", "0b")), ("machine", ("0b", "0a")), ("machine", ("0a", "0c"))],
)
def test_a_proof_of_something_else_is_none(role, parts):
    proof = proof_of(TOKEN, "machine", "0a", "0b")
    assert not is_proof(proof, TOKEN, role, *parts)


@pytest.mark.parametrize(
    "proof", ["", "\xe4", "\ud800", proof_of("another token than that", "machine")]
)
def test_without_the_token_there_is_no_proof(proof):
    assert not is_proof(proof, TOKEN, "machine")


def test_what_utf8_cannot_encode_is_proved_like_any_text():
    assert is_proof(proof_of(TOKEN, "machine", "\ud800"), TOKEN, "machine", "\ud800")
    assert not is_proof(proof_of(TOKEN, "machine", "\ud800"), TOKEN, "machine", "?")


def test_a_file_is_made_for_its_owner_only_and_may_not_contradict_the_variable(tmp_path):
    path = tmp_path / "token"
    with pytest.raises(ConfigError):  # which of the two?
        read_token(path, {"SPOTFORGE_TOKEN": TOKEN}, makes=True)
    made = read_token(path, {}, makes=True)
    assert made not in (None, TOKEN) and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_token(path, {}) == made == read_token(path, {}, makes=True)
    assert read_token(path, {"SPOTFORGE_TOKEN": made}) == made
    with pytest.raises(ConfigError) as refused:
        read_token(path, {"SPOTFORGE_TOKEN": TOKEN})
    assert refused.value.key == "--token-file"
    assert read_token(None, {"SPOTFORGE_TOKEN": f" {TOKEN}\n"}) == TOKEN
    assert read_token(None, {}) is None


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff" * 20, None])
def test_files_without_a_good_token_are_refused(tmp_path, content):
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_token(path, {})
    assert refused.value.key == "--token-file"


def test_the_token_that_a_supervisor_made_lets_machines_join(site):
    supervisor, port = site.listen("--nproc", 0, toy=LONG, host="0.0.0.0")
    token = supervisor.wait_for_line(r"SPOTFORGE_TOKEN=(\S+) python -m launch join \S+:\d+ -- ")[1]
    without = site.join(port, "--nproc", 1, toy=LONG)
    assert without.end() == 2 and "SPOTFORGE_TOKEN" in without.printed
    wrong = site.join(port, "--nproc", 1, toy=LONG, env={"SPOTFORGE_TOKEN": new_token()})
    assert wrong.end() == 2
    supervisor.wait_for_line(r"refused 127\.0\.0\.1: .* \(2 of this kind so far\)")
    joined = site.join(port, "--nproc", 1, toy=LONG, env={"SPOTFORGE_TOKEN": token})
    site.wait_for_step(3)
    supervisor.send()
    assert (supervisor.end(), joined.end()) == (33, 33)
    assert token not in joined.printed


def test_a_token_in_a_file_is_not_shown(site, tmp_path):
    path = tmp_path / "token"
    supervisor, port = site.listen("--nproc", 0, "--token-file", path, host="0.0.0.0")
    joined = site.join(port, "--nproc", 1, "--token-file", path)
    assert (supervisor.end(), joined.end()) == (0, 0)
    assert path.read_text().strip() not in supervisor.printed


def test_a_supervisor_without_the_machine_s_token_is_not_obeyed(site):
    supervisor, port = site.listen("--nproc", 0)  # on loopback, so that it makes none
    joined = site.join(port, "--nproc", 1, env={"SPOTFORGE_TOKEN": TOKEN})
    assert joined.end() == 2
    assert site.starts() == []


def test_what_was_heard_on_the_wire_lets_nobody_join(site, tmp_path):
    """The answer to one challenge is none to the next."""
    supervisor, port = site.listen("--nproc", 1, toy=LONG, env={"SPOTFORGE_TOKEN": TOKEN})
    digest = command_digest([str(word) for word in site.command(*LONG)[1:]])
    versions = software()
    parts = (1, digest, "127.0.0.1", json.dumps(versions, sort_keys=True))

    def greet(proof_for=None):
        """Joins with the answer to a challenge, else to the one that comes; returns the answer."""
        with socket.create_connection(("127.0.0.1", port)) as machine, machine.makefile("rw") as io:
            machine.settimeout(120)
            challenge = json.loads(io.readline())["challenge"]
            proof = proof_of(TOKEN, "machine", proof_for or challenge, "00", *parts)
            hello = {"type": "Hello", "version": VERSION, "nproc": 1, "command_sha256": digest}
            hello |= {"address": "127.0.0.1", "challenge": "00", "proof": proof}
            hello["software"] = versions
            io.write(json.dumps(hello) + "\n")
            io.flush()
            return challenge, json.loads(io.readline())

    heard, answer = greet()
    assert answer["type"] == "Welcome"
    assert is_proof(answer["proof"], TOKEN, "supervisor", "00", heard)
    assert greet(proof_for=heard)[1]["type"] == "Refused"
    supervisor.send()
    supervisor.end()


def test_a_stranger_who_never_ends_a_line_is_refused_at_4_kib(site):
    supervisor, port = site.listen("--nproc", 0)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"x" * 5000)
        supervisor.wait_for_line("refused 127.0.0.1: .* 4096 bytes")
        stranger.settimeout(120)
        with suppress(ConnectionError):  # it hangs up, maybe on what it has not read
            while stranger.recv(4096):
                pass
    supervisor.send()
    assert supervisor.end() == 33


def test_versions_that_are_made_up_are_one_reason(site):
    """So that a stranger can neither fill the log nor the memory."""
    supervisor, port = site.listen("--nproc", 0)
    hello = {"type": "Hello", "nproc": 1, "command_sha256": "", "address": "127.0.0.1"}
    for version in range(100, 115):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            words = json.dumps({**hello, "version": version, "challenge": "", "proof": ""})
            stranger.sendall(words.encode() + b"\n")
            stranger.settimeout(120)
            assert any(b"Refused" in line for line in stranger.makefile("rb"))
    supervisor.send()
    supervisor.end()
    assert supervisor.printed.count("another version") == 10


def test_a_token_for_nobody_is_refused(site, tmp_path):
    supervisor = site.supervise("--nproc", 1, "--token-file", tmp_path / "token")
    assert supervisor.end() == 2
    assert re.search("--token-file.*--listen", supervisor.printed)
