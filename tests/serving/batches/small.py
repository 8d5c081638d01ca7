"""What the tests of batches have in common."""

import json
import subprocess
import sys
import time
from pathlib import Path

import openai

from serving.batches.database import Database
from tests.ports import free_port

ROOT = Path(__file__).parents[3]


def wait_until(is_true, timeout_s=300.0):
    """Returns the first true value; it has to last, or a late look would miss it."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := is_true()):
        assert time.monotonic() < deadline_s, "it did not come"
        time.sleep(0.02)
    return value


class SmallGateway:
    """The program `small_gateway`, its folder and what its engine was asked."""

    def __init__(self, folder, delay_s, *settings):
        self.folder, self.log, self.output = folder, folder / "asked", folder / "output"
        self._command = [sys.executable, "-m", "tests.serving.batches.small_gateway"]
        self._command += [str(self.log), str(delay_s), "artifact=small", "model_name=small"]
        self._command += [f"batches.dir={folder / 'batches'}", *settings]
        self.port = free_port()  # at which it is started again
        self.log.touch()
        self.start()

    def start(self):
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*self._command, f"port={self.port}"], cwd=ROOT, stdout=output, stderr=output
            )
        wait_until(lambda: "/v1\n" in self.output.read_text() or self.process.poll() is not None)
        self.url = self.output.read_text().split(" at ")[1].split("/v1")[0]

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        assert self.process.wait(120) == 0, self.output.read_text()

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def asked(self, name=""):
        """The prompts that begin with a name, without the gates that they wait for."""
        texts = [text.partition(" until ")[0] for text in self.log.read_text().splitlines()]
        return [text for text in texts if text.startswith(name)]

    def open_gate(self, name):
        """Has all answers go on that wait `until` this name, now and later."""
        self.log.with_suffix(f".{name}").touch()

    def committed(self, name):
        """The prompts `NAME NUMBER` whose answers are in the database."""
        database = Database(self.folder / "batches")
        try:
            rows = database.read("SELECT number FROM lines WHERE result IS NOT NULL")
            return {f"{name} {row['number'] - 1}" for row in rows}
        finally:
            database.close()


def request(name, prompt, **body):
    """A line of an input file."""
    body = {"model": "small", "prompt": prompt, "max_tokens": 64, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def requests(num_lines, name, **held_from):
    """Lines whose answers wait, from a number on, until the gate of that name is opened."""
    lines = []
    for i in range(num_lines):
        gates = [gate for gate, first in held_from.items() if i >= first]
        until = f" until {gates[-1]}" if gates else ""
        lines.append(request(f"r{i}", f"{name} {i}{until}"))
    return lines


def upload(client, lines):
    content = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
    return client.files.create(file=("input.jsonl", content), purpose="batch")


def begin(client, lines, endpoint="/v1/completions"):
    file = upload(client, lines)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def end(client, batch, timeout_s=300.0):
    def ended():
        now = client.batches.retrieve(batch.id)
        return now if now.status in ("completed", "failed", "expired", "cancelled") else None

    return wait_until(ended, timeout_s)


def read(client, file_id):
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
