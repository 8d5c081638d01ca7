"""Every way of being told to stop: signals, a notice file, three clouds (served on loopback)."""

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.errors import ConfigError
from core.settings.rules import check_settings
from trainer import preemption, stopping
from trainer.preemption import (
    AutoNotice,
    AwsNotice,
    AzureNotice,
    GcpNotice,
    NoticeFile,
    PreemptionConfig,
)
from trainer.stopping import StopSignal

ROOT = Path(__file__).parents[2]


class Cloud:
    """A metadata service on loopback; `answers` maps method and path to (status, body)."""

    def __init__(self, answers):
        self.answers, self.asked, self.delay_s = answers, [], 0.0

    def answer(self, method, path, headers):
        self.asked.append(f"{method} {path}")
        answer = self.answers.get(f"{method} {path}", (404, ""))
        return answer(headers) if callable(answer) else answer


def aws(action=None, rebalance=None):
    """EC2's service, whose current token is the newest it gave; `cloud.tokens` may be cleared."""
    tokens = []

    def token(headers):
        if not 0 < int(headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600:
            return 400, ""
        tokens.append(f"token-{len(cloud.asked)}==")
        return 200, tokens[-1]

    def guarded(body):
        def answer(headers):
            if headers["X-aws-ec2-metadata-token"] not in tokens[-1:]:
                return 401, ""
            return (200, body) if body is not None else (404, "<html>not found</html>")

        return answer

    cloud = Cloud({"PUT /latest/api/token": token})
    cloud.answers[f"GET {AWS_ACTION}"] = guarded(action)
    cloud.answers[f"GET {AWS_REBALANCE}"] = guarded(rebalance)
    cloud.tokens = tokens
    return cloud


def gcp(preempted="FALSE"):
    def answer(headers):
        return (200, preempted) if headers["Metadata-Flavor"] == "Google" else (403, "")

    return Cloud({"GET /computeMetadata/v1/instance/preempted": answer})


def azure(*events, name="vmss_3"):
    def guarded(body):
        return lambda headers: (200, body) if headers["Metadata"] == "true" else (400, "")

    listed = ", ".join(events)
    return Cloud(
        {
            f"GET {AZURE_NAME}": guarded(name),
            f"GET {AZURE_EVENTS}": guarded(f'{{"DocumentIncarnation": 1, "Events": [{listed}]}}'),
        }
    )


AWS_ACTION = "/latest/meta-data/spot/instance-action"
AWS_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"


def azure_event(kind, *names, at="Mon, 19 Sep 2026 18:29:47 GMT"):
    resources = ", ".join(f'"{name}"' for name in names)
    return (
        f'{{"EventId": "A", "EventStatus": "Scheduled", "EventType": "{kind}", '
        f'"ResourceType": "VirtualMachine", "Resources": [{resources}], "NotBefore": "{at}"}}'
    )


@contextmanager
def serving(cloud):
    """Serves a cloud, and yields its base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = cloud.answer(self.command, self.path, self.headers)
            closing.wait(cloud.delay_s)
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())
            except ConnectionError:
                pass  # a client that no longer waits

        do_PUT = do_GET

        def log_message(self, *arguments):
            pass

    closing = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def until(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def rank_dir(tmp_path, monkeypatch):
    folder = tmp_path / "rank"
    folder.mkdir()
    monkeypatch.setenv("SPOTFORGE_RANK_DIR", str(folder))
    return folder


# Settings


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"cloud": "amazon"}, "preemption.cloud"),
        ({"cloud": "aws", "metadata_url": "127.0.0.1:80"}, "preemption.metadata_url"),
        ({"metadata_url": "http://127.0.0.1"}, "preemption.metadata_url"),
        ({"notice_file": ""}, "preemption.notice_file"),
        ({"poll_s": 0.0}, "preemption.poll_s"),
        ({"poll_s": float("nan")}, "preemption.poll_s"),
        ({"poll_s": float("inf")}, "preemption.poll_s"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, key):
    with pytest.raises(ConfigError) as refused:
        check_settings(PreemptionConfig(**settings), "preemption")
    assert refused.value.key == key


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, []),
        ({"notice_file": "x"}, [NoticeFile]),
        ({"cloud": "aws"}, [AwsNotice]),
        ({"cloud": "gcp"}, [GcpNotice]),
        ({"notice_file": "x", "cloud": "azure"}, [NoticeFile, AzureNotice]),
        ({"cloud": "auto"}, [AutoNotice]),
    ],
)
def test_a_source_for_each_setting(settings, kinds):
    assert [type(source) for source in PreemptionConfig(**settings).build()] == kinds


def test_neither_torch_nor_http_is_imported_early():
    code = (
        "import sys, trainer.stopping; "
        "print(sorted({'torch', 'urllib.request', 'ssl', 'fsspec'} & set(sys.modules)))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert out.strip() == "[]"


# What each source announces


def test_notice_file(tmp_path):
    [source] = PreemptionConfig(notice_file=str(tmp_path / "stop")).build()
    assert source.poll() is None
    (tmp_path / "stop").touch()
    assert source.poll() == f"notice file {tmp_path / 'stop'} appeared"


@pytest.mark.parametrize(
    ("cloud", "leaf", "announced"),
    [
        (aws(), AwsNotice, None),
        (
            aws(action='{"action": "terminate", "time": "2026-09-18T08:22:00Z"}'),
            AwsNotice,
            "AWS will terminate this instance at 2026-09-18T08:22:00Z",
        ),
        (
            aws(action='{"action": "hibernate"}'),
            AwsNotice,
            "AWS will hibernate this instance at an unknown time",
        ),
        (
            aws(rebalance='{"noticeTime": "2026-10-27T08:22:00Z"}'),
            AwsNotice,
            "AWS has recommended since 2026-10-27T08:22:00Z to leave this instance (rebalance)",
        ),
        (gcp("FALSE"), GcpNotice, None),
        (gcp("TRUE\n"), GcpNotice, "GCP is preempting this instance"),
        (azure(), AzureNotice, None),
        (
            azure(azure_event("Freeze", "vmss_3"), azure_event("Preempt", "vmss_1", "vmss_3")),
            AzureNotice,
            "Azure will preempt this VM at Mon, 19 Sep 2026 18:29:47 GMT",
        ),
        (
            azure(azure_event("Terminate", "vmss_3", at="")),
            AzureNotice,
            "Azure will terminate this VM at once",
        ),
        # Others of the scale set; one of them has a name that begins with ours
        (azure(azure_event("Preempt", "vmss_1", "vmss_33"), azure_event("Reboot", "vmss_3")),)
        + (AzureNotice, None),
    ],
)
def test_what_a_cloud_announces(cloud, leaf, announced):
    with serving(cloud) as url:
        source = leaf(url)
        assert source.poll() == announced
        assert source.poll() == announced


def test_aws_token_is_kept_until_it_expires():
    cloud = aws(action='{"action": "stop", "time": "T"}')
    with serving(cloud) as url:
        source = AwsNotice(url)
        for _ in range(3):
            assert source.poll() == "AWS will stop this instance at T"
        assert cloud.asked.count("PUT /latest/api/token") == 1
        cloud.tokens.append("a newer one")
        assert source.poll() == "AWS will stop this instance at T"
        assert cloud.asked.count("PUT /latest/api/token") == 2


RUBBISH = ["", "null", "[]", "{}", "{", "<html>Log in</html>", '{"Events": [1]}', "\x00" * 99]


@pytest.mark.parametrize("text", RUBBISH)
def test_rubbish_is_no_announcement(text):
    for cloud, leaf in [
        (aws(action=text), AwsNotice),
        (aws(rebalance=text), AwsNotice),
        (gcp(text), GcpNotice),
        (azure(text or "7"), AzureNotice),
        (Cloud({f"GET {AZURE_NAME}": (200, "vm"), f"GET {AZURE_EVENTS}": (200, text)}),)
        + (AzureNotice,),
    ]:
        with serving(cloud) as url, pytest.raises(ValueError):
            leaf(url).poll()


@pytest.mark.parametrize("leaf", [AwsNotice, GcpNotice, AzureNotice])
def test_a_service_that_is_broken_slow_or_down_raises(leaf, monkeypatch):
    with serving(Cloud({})) as url, pytest.raises(OSError, match="status 404"):
        leaf(url).poll()
    with pytest.raises(OSError, match="refused"):  # the same port, with no one there
        leaf(url).poll()
    monkeypatch.setattr(preemption, "_TIMEOUT_S", 0.1)
    slow = Cloud({})
    slow.delay_s = 60.0
    with serving(slow) as url, pytest.raises(OSError, match="timed out"):
        leaf(url).poll()


def test_proxies_are_not_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(gcp("TRUE")) as url:
        assert GcpNotice(url).poll() is not None


# Auto


@pytest.mark.parametrize(
    ("cloud", "announced"),
    [
        (aws(action='{"action": "stop", "time": "T"}'), "AWS will stop this instance at T"),
        (gcp("TRUE"), "GCP is preempting this instance"),
        (azure(azure_event("Preempt", "vmss_3", at="T")), "Azure will preempt this VM at T"),
    ],
)
def test_auto_finds_out_which_cloud_this_is(cloud, announced):
    with serving(cloud) as url:
        [source] = PreemptionConfig(cloud="auto", metadata_url=url).build()
        assert cloud.asked == []  # a start waits for nothing
        assert source.poll() == announced
        cloud.asked.clear()
        assert source.poll() == announced
        assert set(cloud.asked) <= set(cloud.answers)  # no other cloud's service is asked again


@pytest.mark.parametrize("page", [None, (200, "<html>Log in to the hotel's network</html>")])
def test_auto_outside_of_a_cloud_asks_each_once_and_is_silent(page):
    cloud = Cloud({})
    if page is not None:
        cloud.answer = lambda method, path, headers: cloud.asked.append(path) or page
    with serving(cloud) as url:
        [source] = PreemptionConfig(cloud="auto", metadata_url=url).build()
        assert [source.poll() for _ in range(3)] == [None, None, None]
    assert len(cloud.asked) == 3


# Watching


def test_a_notice_stops_and_says_why(rank_dir):
    cloud = gcp("FALSE")
    with serving(cloud) as url, StopSignal() as stop:
        stop.watch(PreemptionConfig(cloud="gcp", metadata_url=url).build(), poll_s=0.01)
        until(lambda: len(cloud.asked) > 3)
        assert not stop.requested() and stop.reason is None and not list(rank_dir.iterdir())
        cloud.answers |= gcp("TRUE").answers
        assert stop.wait(120)
        assert stop.reason == "GCP is preempting this instance"
        assert (rank_dir / "stop_reason.txt").read_text() == f"{stop.reason}\n"
        # It has said what it had to say.
        until(lambda: not watching())


def test_the_first_reason_stays(rank_dir, tmp_path):
    notice = tmp_path / "stop"
    with StopSignal() as stop:
        stop.watch(PreemptionConfig(notice_file=str(notice)).build(), poll_s=0.01)
        notice.touch()
        assert stop.wait(120)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() and stop.reason == f"notice file {notice} appeared"
    assert (rank_dir / "stop_reason.txt").read_text() == f"notice file {notice} appeared\n"


def test_watching_ends_with_the_run():
    with StopSignal() as stop:
        stop.watch(PreemptionConfig(notice_file="/nowhere").build(), poll_s=3600)
        assert watching()
    until(lambda: not watching())  # far less than an hour


def test_a_request_under_way_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(preemption, "_TIMEOUT_S", 3600.0)
    monkeypatch.setattr(stopping, "_JOIN_S", 0.05)
    cloud = gcp("TRUE")
    cloud.delay_s = 3600.0
    with serving(cloud) as url:
        with StopSignal() as stop:
            stop.watch([GcpNotice(url)], poll_s=0.01)
            until(lambda: cloud.asked)
        assert watching()  # it goes on, and nobody waits for it
    until(lambda: not watching())
    assert stop.reason is None  # nobody listens any more


def watching():
    return [thread for thread in threading.enumerate() if thread.name == "preemption"]


def test_a_service_that_stays_silent_is_mentioned_once_and_asked_on(monkeypatch, capfd):
    monkeypatch.setattr(stopping, "_PATIENCE_S", 0.2)
    cloud = Cloud({})
    with serving(cloud) as url, StopSignal() as stop:
        stop.watch(PreemptionConfig(cloud="aws", metadata_url=url).build(), poll_s=0.01)
        said, began_s = [], time.monotonic()
        until(lambda: said.append(capfd.readouterr().err) or any(said))
        asked = len(cloud.asked)
        until(lambda: len(cloud.asked) > asked + 10)
        assert not stop.requested()
        lines = ("".join(said) + capfd.readouterr().err).splitlines()
        assert len(lines) == 1, lines
        start = re.escape(f"preemption.cloud=aws ({url}): no usable answer for ")
        failing_s = int(re.match(rf"{start}(\d+) s", lines[0])[1])
        assert failing_s <= time.monotonic() - began_s + 1
        assert "status 404" in lines[0] and "hop limit" in lines[0]
        cloud.answers |= aws(action='{"action": "stop", "time": "T"}').answers
        assert stop.wait(120) and stop.reason == "AWS will stop this instance at T"


def test_azure_may_take_its_time_to_wake_up(monkeypatch, capfd):
    monkeypatch.setattr(preemption, "_TIMEOUT_S", 0.05)
    cloud = azure(azure_event("Preempt", "vmss_3", at="T"))
    events = f"GET {AZURE_EVENTS}"
    awake = cloud.answers[events]

    wakes = threading.Event()

    def asleep(headers):
        wakes.wait(300)
        return awake(headers)

    cloud.answers[events] = asleep
    with serving(cloud) as url, StopSignal() as stop:
        stop.watch(PreemptionConfig(cloud="azure", metadata_url=url).build(), poll_s=0.01)
        until(lambda: cloud.asked.count(events) > 2)
        assert not stop.requested()
        wakes.set()
        assert stop.wait(120) and stop.reason == "Azure will preempt this VM at T"
    assert capfd.readouterr().err == ""


class Broken:
    what = "test"

    def poll(self):
        raise RuntimeError("a bug")


def test_a_broken_source_silences_no_other(tmp_path):
    (tmp_path / "stop").touch()
    with StopSignal() as stop:
        stop.watch([Broken(), NoticeFile(tmp_path / "stop")], poll_s=0.01)
        assert stop.wait(120) and "appeared" in stop.reason


class Moody:
    what = "test"
    asked = 0

    def poll(self):
        """Fails two times of three."""
        self.asked += 1
        if self.asked % 3:
            raise OSError("now and then")


def test_a_source_that_fails_now_and_then_is_not_mentioned(monkeypatch, capfd):
    """Two failures are half a patience apart, by a clock that goes on with each question."""
    source = Moody()
    patience_s, clock = stopping._PATIENCE_S, SimpleNamespace(sleep=time.sleep)
    clock.monotonic = lambda: source.asked * patience_s / 2
    with StopSignal() as stop:
        monkeypatch.setattr(stopping, "time", clock)
        stop.watch([source], poll_s=0.001)
        until(lambda: source.asked > 30)
        assert not stop.requested()
    assert capfd.readouterr().err == ""


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_the_reason(number, rank_dir):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested() and not stop.wait(0.01)
        os.kill(os.getpid(), number)
        assert stop.wait(120) and stop.reason == number.name
        assert (rank_dir / "stop_reason.txt").read_text() == f"{number.name}\n"
    assert signal.getsignal(number) is before


def test_a_signal_after_the_last_step_is_recorded_too(rank_dir):
    with StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (rank_dir / "stop_reason.txt").read_text() == "SIGTERM\n"


def test_a_signal_is_recorded_by_the_watcher_while_a_step_takes_long(rank_dir):
    with StopSignal() as stop:
        stop.watch([NoticeFile(rank_dir / "never")], poll_s=0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        reason = rank_dir / "stop_reason.txt"
        until(reason.exists)  # it is renamed there, when it is whole
        assert reason.read_text() == "SIGTERM\n"


def test_who_was_not_told_records_nothing(rank_dir):
    with StopSignal() as stop:
        assert not stop.requested()
    assert list(rank_dir.iterdir()) == []


def test_a_reason_that_cannot_be_recorded_is_said(rank_dir, capfd):
    rank_dir.rmdir()
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() and stop.requested()
    [line] = capfd.readouterr().err.splitlines()
    assert "stop_reason.txt could not be written" in line and line.endswith("SIGTERM")


_AT_EVERY_INSTRUCTION = """
import signal
import sys
from pathlib import Path
from trainer.preemption import NoticeFile
from trainer.stopping import StopSignal

def interrupt(frame, event, argument):
    global count
    count += 1
    frame.f_trace_opcodes = True
    signal.raise_signal(signal.SIGTERM)
    return interrupt

count = 0
with StopSignal():  # for signals that come before the inner one is entered
    print("ready", flush=True)
    sys.settrace(interrupt)
    with StopSignal() as stop:
        stop.watch([NoticeFile(Path("nowhere"))], poll_s=60)
        stop.requested()
        stop.wait(1)
    sys.settrace(None)
print(count)
"""

_STORM = """
import sys
from trainer.stopping import StopSignal

heard = 0
with StopSignal():
    print("ready", flush=True)
    while heard < 100:
        with StopSignal() as stop:
            heard += stop.wait(0.1) and stop.requested() and stop.reason.startswith("SIG")
    print(heard, flush=True)
    sys.stdin.read()  # the storm ends before its handlers do
"""


@contextmanager
def ready(program, folder):
    environment = os.environ | {"SPOTFORGE_RANK_DIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_signal_between_any_two_instructions_blocks_nothing(tmp_path):
    """A lock that the interrupted code holds and its handler wants would hang for ever."""
    with ready(_AT_EVERY_INSTRUCTION, tmp_path) as process:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and int(out) > 500


def test_a_storm_of_signals_blocks_nothing(tmp_path):
    """Handlers interrupt each other, too."""
    with ready(_STORM, tmp_path) as process:
        deadline = time.monotonic() + 120
        while not select.select([process.stdout], [], [], 0)[0]:
            assert time.monotonic() < deadline
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                process.send_signal(number)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and out == "100\n"
