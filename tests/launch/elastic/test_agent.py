"""Several machines, which are processes here: joining, leaving, getting lost, being refused."""

import json
import os
import signal
import socket

import pytest

from launch.elastic.protocol import MAX_LINE_BYTES, VERSION
from tests.launch.elastic.conftest import LONG, is_running, wait_until
from tests.ports import free_port


def pids(site, world_size, rank):
    return [s["pid"] for s in site.starts() if (s["world_size"], s["rank"]) == (world_size, rank)]


def test_all_machines_finish_together(site):
    supervisor, port = site.listen("--nproc", 1, "--nodes", 2)
    supervisor.wait_for_line("waiting for 1 node to join")
    agent = site.join(port, "--nproc", 2)
    assert (supervisor.end(), agent.end()) == (0, 0)
    assert "start 1: 3 ranks on 2 nodes" in supervisor.printed
    starts = sorted(site.starts(), key=lambda start: start["rank"])
    places = [(s["rank"], s["LOCAL_RANK"], s["LOCAL_WORLD_SIZE"], s["GROUP_RANK"]) for s in starts]
    assert places == [(0, "0", "1", "0"), (1, "0", "2", "1"), (2, "1", "2", "1")]
    assert {start["world_size"] for start in starts} == {3}


def test_a_supervisor_without_ranks(site):
    toy = ["--echo", "--do", 1, 2, 2, 9]
    supervisor, port = site.listen("--nproc", 0, toy=toy)
    agent = site.join(port, "--nproc", 2, toy=toy)
    assert agent.end() == 2
    assert supervisor.end() == 2


def test_machines_are_lost_and_come_back(site):
    """2 -> 1 -> 2 nodes, three times; nothing runs on where an agent was killed."""
    supervisor, port = site.listen("--nproc", 1, "--nodes", 2, toy=LONG)
    agent = site.join(port, "--nproc", 1, toy=LONG)
    for number in (1, 2, 3):
        wait_until(lambda n=number: len(pids(site, 2, 1)) == n, lambda: supervisor.printed)
        gang = site.folder / site.starts()[-1]["gang"]
        wait_until(lambda g=gang: len(list(g.glob("*-*"))) > 20, lambda: supervisor.printed)
        agent.send(signal.SIGKILL)
        wait_until(lambda n=number: len(pids(site, 1, 0)) == n, lambda: supervisor.printed)
        # What the kernel kills with the agent is gone once it has had a CPU for that.
        old = pids(site, 2, 0) + pids(site, 2, 1)
        wait_until(lambda o=old: not any(map(is_running, o)), lambda: "an orphan")
        agent = site.join(port, "--nproc", 1, toy=LONG)
        supervisor.wait_for_line(rf"(?s)(stopping 1 rank to go on with 2.*){{{number}}}")
    wait_until(lambda: len(pids(site, 2, 1)) == 4, lambda: supervisor.printed)
    supervisor.send()
    assert (supervisor.end(), agent.end()) == (33, 33)
    assert "lost node 127.0.0.1 (1 rank): closed the connection; going on with 1" in (
        supervisor.printed
    )
    events = [event["event"] for event in site.events()]
    assert events == ["join", *["start", "lost", "start", "join", "grow"] * 3, "start", "stop"]


def test_a_machine_that_leaves_has_all_save_first(site):
    supervisor, port = site.listen("--nproc", 1, "--nodes", 2, toy=LONG)
    agent = site.join(port, "--nproc", 1, toy=LONG)
    site.wait_for_step(3)
    agent.send()
    agent.wait_for_line("SIGTERM: telling the supervisor")
    agent.send(signal.SIGINT)  # impatience changes nothing
    assert agent.end() == 33
    supervisor.wait_for_line("start 2: 1 rank on 1 node after step")
    assert site.checkpoint() >= 3
    assert "node 127.0.0.1 (1 rank) goes away: SIGTERM; going on with 1" in supervisor.printed
    supervisor.send()
    assert supervisor.end() == 33


def test_a_rank_that_is_told_takes_its_machine_away(site):
    toy = [*LONG, "--do", 1, 3, "notice", 1]
    supervisor, port = site.listen("--nproc", 1, "--nodes", 2, toy=toy)
    agent = site.join(port, "--nproc", 1, toy=toy)
    assert agent.end() == 33
    supervisor.wait_for_line("start 2: 1 rank on 1 node after step 3")
    supervisor.send()
    assert supervisor.end() == 33


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_without_a_machine_it_waits_for_one(site, how):
    supervisor, port = site.listen("--nproc", 0, toy=LONG)
    agent = site.join(port, "--nproc", 1, toy=LONG)
    site.wait_for_step(3)
    agent.send(how)
    supervisor.wait_for_line("none is left\n.*waiting for 1 node to join")
    site.join(port, "--nproc", 1, toy=LONG)
    supervisor.wait_for_line("start 2: 1 rank on 1 node")
    supervisor.send()
    assert supervisor.end() == 33


def test_a_machine_that_must_go_does_not_wait_for_ever(site):
    toy = [*LONG, "--do", 1, 3, "hang", 1]
    supervisor, port = site.listen("--nproc", 1, "--nodes", 2, toy=toy)
    agent = site.join(port, "--nproc", 1, "--grace", 0.5, toy=toy)
    site.wait_for_step(3)
    agent.send()
    assert agent.end() == 1
    assert "its ranks did not end within 0.5 s: killed" in agent.printed
    supervisor.wait_for_line("start 2: 1 rank on 1 node")


def test_a_machine_that_must_go_does_not_wait_for_the_others(site):
    toy = [*LONG, "--save-s", 60]  # of rank 0 only
    supervisor, port = site.listen("--nproc", 1, "--nodes", 2, toy=toy)
    # Long enough for the signal to go round, by way of the supervisor, on a machine that is slow.
    agent = site.join(port, "--nproc", 1, "--grace", 6, toy=toy)
    site.wait_for_step(3)
    agent.send()
    assert agent.end() == 33
    assert "not dismissed within 6 s, but its ranks have ended: leaving" in agent.printed
    assert "start 2" not in supervisor.printed  # it waits for rank 0


def test_a_machine_that_would_not_be_used_interrupts_nothing(site):
    supervisor, port = site.listen("--nproc", 2, "--multiple-of", 2, toy=LONG)
    first = site.join(port, "--nproc", 1, toy=LONG)
    supervisor.wait_for_line(r"node 127.0.0.1 joined \(1 rank\)")
    site.wait_for_step(20)
    assert "start 2" not in supervisor.printed
    site.join(port, "--nproc", 1, toy=LONG)
    supervisor.wait_for_line("start 2: 4 ranks on 3 nodes")
    first.send(signal.SIGKILL)
    supervisor.wait_for_line("start 3: 2 ranks on 1 node")
    supervisor.send()
    assert supervisor.end() == 33


def test_a_failure_elsewhere_is_told_here(site):
    toy = ["--echo", "--do", 1, 3, "error", 1]
    supervisor, port = site.listen("--nproc", 1, "--nodes", 2, toy=toy)
    agent = site.join(port, "--nproc", 1, toy=toy)
    assert (supervisor.end(), agent.end()) == (0, 0)
    assert "rank 1 failed with exit code 1 at step 3: ValueError" in supervisor.printed
    assert "start 2: 2 ranks on 2 nodes" in supervisor.printed


def test_stacks_come_from_other_machines(site):
    toy = ["--steps", 30, "--do", 1, 25, "hang", 1]
    supervisor, port = site.listen("--nproc", 1, "--nodes", 2, "--hang-timeout", 4, toy=toy)
    agent = site.join(port, "--nproc", 1, toy=toy)
    assert (supervisor.end(), agent.end()) == (0, 0)
    here, there = supervisor.printed.split("stacks of rank 1 on node 127.0.0.1, train 25:")
    assert " in meet\n" in here
    assert " in happen\n" in there


def test_ranks_save_when_their_supervisor_dies_and_its_successor_goes_on(site):
    toy, port = [*LONG, "--save-s", 1], free_port()
    options = ["--nproc", 0, "--nodes", 2, "--listen", f"127.0.0.1:{port}"]
    supervisor = site.supervise(*options, toy=toy)
    supervisor.wait_for_line("listening on")
    agents = [site.join(port, "--nproc", 1, toy=toy) for _ in range(2)]
    site.wait_for_step(3)
    supervisor.send(signal.SIGKILL)
    supervisor.end()
    for agent in agents:
        agent.wait_for_line("lost the supervisor: .*; its ranks save")
    for start in site.starts():
        wait_until(lambda: not is_running(start["pid"]), lambda: "an orphan")  # noqa: B023
    saved = site.checkpoint()
    last = max(int(path.name.partition("-")[0]) for path in site.folder.glob("gang-*/*-0"))
    assert saved == last >= 3, "a step was lost"
    again = site.supervise(*options, toy=toy)
    again.wait_for_line("start 1: 2 ranks on 2 nodes")
    site.wait_for_step(saved + 2)
    again.send()
    assert (again.end(), *(agent.end() for agent in agents)) == (33, 33, 33)


def test_ranks_that_have_lost_their_peers_as_well_are_killed(site):
    """The supervisor's machine had a rank, for which the others wait for ever."""
    # Rank 0 does not come to the end of step 4, at which rank 1 waits for it.
    toy = [*LONG, "--do", 0, 4, "hang", 1]
    supervisor, port = site.listen("--nproc", 1, "--nodes", 2, toy=toy)
    agent = site.join(port, "--nproc", 1, "--grace", 3, toy=toy)
    site.wait_for_step(4)
    supervisor.send(signal.SIGKILL)
    agent.wait_for_line("its ranks did not end within 3 s: killed")
    for start in site.starts():
        wait_until(lambda: not is_running(start["pid"]), lambda: "an orphan")  # noqa: B023
    agent.send()
    assert agent.end() == 33


def test_an_agent_that_runs_something_else_is_refused(site):
    supervisor, port = site.listen("--nproc", 1, toy=LONG)
    other = site.join(port, "--nproc", 1, toy=[*LONG, "--echo"])
    assert other.end() == 2
    assert len(other.printed.splitlines()) == 1
    assert "its command after -- differs from the supervisor's" in other.printed
    supervisor.wait_for_line("refused 127.0.0.1: its command after -- differs")
    site.wait_for_step(5)
    supervisor.send()
    assert supervisor.end() == 33


def test_strangers_at_the_port_disturb_nothing(site):
    supervisor, port = site.listen("--nproc", 1, toy=LONG)
    hello = {"type": "Hello", "version": VERSION, "nproc": 1, "command_sha256": "", "address": "x"}
    hello |= {"challenge": "", "proof": ""}
    for garbage in (
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        os.urandom(4096) + b"\n",
        b"[" * 100_000 + b"\n",
        b"x" * (MAX_LINE_BYTES * 2 + 100),
        b'{"type": "Status"}\n',
        b'{"type": "Dismiss", "code": 0, "reason": ""}\n',
        json.dumps({**hello, "nproc": "many"}).encode() + b"\n",
        json.dumps({**hello, "more": 1}).encode() + b"\n",
        json.dumps({**hello, "challenge": "x" * 5000}).encode() + b"\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.settimeout(120)
            try:
                stranger.sendall(garbage)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass
            except ConnectionError:
                pass  # it hung up before it had heard us out
    site.wait_for_step(5)
    agent = site.join(port, "--nproc", 1, toy=LONG)
    supervisor.wait_for_line("start 2: 2 ranks on 2 nodes")
    supervisor.send()
    assert (supervisor.end(), agent.end()) == (33, 33)
    assert "Traceback" not in supervisor.printed


def test_what_is_no_supervisor_is_said_to_be_none(site):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(300)
        agent = site.join(server.getsockname()[1], "--nproc", 1)
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"220 mail.example.com ESMTP\r\n")
            assert agent.end() == 2
    assert "is not a supervisor" in agent.printed


def test_an_agent_that_finds_no_supervisor_can_be_stopped(site):
    agent = site.join(free_port(), "--nproc", 1)
    agent.wait_for_line("no supervisor at .* yet; trying for 300 s")
    agent.send()
    assert agent.end() == 33
