"""Child processes that talk in lines, whatever they say."""

import asyncio
import os
import sys
import threading

import pytest

from core.process.json_child import ChildEnded, JsonChild
from core.process.liveness import LOOK_S, _Threads, _threads_of

LINES = "import sys, json; say = lambda x: print(json.dumps(x), flush=True)\n"


def run(program, *said):
    """What a program says to some lines, and how it ends."""

    async def work():
        heard = []
        hear = lambda kind, content: heard.append((kind, content))  # noqa: E731
        child = await JsonChild.start([sys.executable, "-c", LINES + program], hear)
        for content in said:
            child.say("line", content)
        with pytest.raises(ChildEnded) as ended:
            await child.unless_it_ends(asyncio.Event().wait())
        await child.kill()
        return heard, str(ended.value)

    return asyncio.run(work())


def test_lines_of_any_length():
    text = "naïve \n" * 400_000
    heard, ended = run("say(json.loads(input())); say(json.loads(input())); sys.exit(3)", text, 1)
    assert heard == [("line", text), ("line", 1)]
    assert ended == "failed with exit code 3, and said nothing"


def test_ctrl_c_is_not_for_it_and_its_share_of_a_cpu_is_the_gateways():
    told, _ = run("import os; say({'group': os.getpgid(0), 'session': os.getsid(0)})")
    assert dict(told)["group"] != os.getpgid(0)
    assert dict(told)["session"] == os.getsid(0)  # Linux shares a CPU among sessions


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            "sys.stderr.write('12%\\r' * 10**6 + 'no memory'); sys.exit(1)",
            "failed with exit code 1: no memory",
        ),
        (
            "sys.stderr.write('x' * 5 * 10**6 + '\\nno memory\\n\\n'); sys.exit(1)",
            "1: no memory",
        ),
        (
            "say({'fatal': 'it is full'}); print('-', file=sys.stderr)",
            "exit code 0: it is full",
        ),
        ("print('no json', flush=True); input()", "died of SIGKILL: what it said makes no"),
        ("say([1]); input()", "died of SIGKILL: what it said makes no sense"),
    ],
)
def test_last_words(program, words):
    assert words in run(program)[1]


class Clock:
    """Time as a test has it."""

    def __init__(self):
        self.now_s = 100.0

    def monotonic(self):
        return self.now_s


def looks(monkeypatch, steps):
    """What looks at a silent child show.

    Args:
        monkeypatch: Of pytest.
        steps: For each look, the seconds since the last one, and what is known of its threads.
    """

    async def work():
        clock = Clock()
        monkeypatch.setattr("core.process.liveness.time", clock)
        silent = await JsonChild.start([sys.executable, "-c", "input()"], lambda *_: None)
        found = []
        try:
            for passed_s, threads in steps:
                clock.now_s += passed_s
                monkeypatch.setattr("core.process.liveness._threads_of", lambda _, is_=threads: is_)
                found.append(silent.look())
        finally:
            await silent.kill()
        return found

    return asyncio.run(work())


SLEEPS = _Threads(1.0, {"1": 5.0, "2": 7.0}, wants=False)


def test_a_child_that_does_nothing_on_a_free_host_stands_still(monkeypatch):
    found = looks(monkeypatch, [(LOOK_S, SLEEPS)] * 21)
    assert found[-1].still_s == pytest.approx(5.0)
    assert found[-1].silent_s == pytest.approx(5.0)


@pytest.mark.parametrize(
    "threads",
    [
        # Any of its threads waited for a CPU, runs, waits for a disk, or used some time.
        [SLEEPS._replace(waited_s={"1": 5.0, "2": 7.0 + 0.1 * i}) for i in range(20)],
        [SLEEPS._replace(wants=True)] * 20,
        [SLEEPS._replace(used_s=1.0 + 0.001 * i) for i in range(20)],
    ],
)
def test_a_child_that_would_run_does_not_stand_still(monkeypatch, threads):
    found = looks(monkeypatch, [(LOOK_S, SLEEPS), *((LOOK_S, one) for one in threads)])
    assert max(look.still_s for look in found) < 2 * LOOK_S


def test_while_this_process_is_late_nothing_is_judged(monkeypatch):
    found = looks(monkeypatch, [(LOOK_S, SLEEPS), *[(2.0, SLEEPS)] * 20])
    assert found[-1].still_s < 2 * LOOK_S and found[-1].had_s == 0


def test_what_a_thread_waited_for_a_cpu_is_not_counted_as_silence(monkeypatch):
    waits = [SLEEPS._replace(waited_s={"1": 5.0, "2": 7.0 + 0.2 * i}) for i in range(21)]
    found = looks(monkeypatch, [(LOOK_S, one) for one in waits])
    assert found[-1].silent_s == pytest.approx(20 * (LOOK_S - 0.2))


def test_threads_of_a_process():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    before = _threads_of(os.getpid())
    thread.start()
    after = _threads_of(os.getpid())
    stop.set()
    thread.join()
    name = str(thread.native_id)  # one of an earlier test may end meanwhile
    assert name in after.waited_s and name not in before.waited_s
    assert after.used_s > before.used_s > 0
    assert after.wants, "the thread that asks runs"
    assert _threads_of(2**30) == _Threads(0.0, {}, False)
