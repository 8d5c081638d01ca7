"""The child's end of a pipe on which each line is a JSON object: `{kind: content}`.

Output of libraries is redirected to standard error, so standard output carries only JSON lines.
Only the standard library is imported, because a Python of another environment loads this file too.
"""

import json
import os
import threading
from collections.abc import Iterable
from queue import Empty, SimpleQueue
from typing import Any

IDLE_S = 0.5  # interval at which an idle program sends a sign of life
_BLOCK_BYTES = 1 << 20
_encode = json.JSONEncoder(separators=(",", ":")).encode
Message = tuple[str, Any]  # kind and content


class JsonLines:
    """Reads and writes messages on standard input and output; ends when the parent is gone."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)  # libraries that print must not write into the protocol
        self._queue: SimpleQueue[list[Message]] = SimpleQueue()
        self._lock = threading.Lock()
        # A separate thread notices that the parent is gone even while the program computes.
        threading.Thread(target=self._read, daemon=True).start()

    def say(self, kind: str, content: Any) -> None:
        """Writes one message."""
        self.say_all([(kind, content)])

    def say_all(self, messages: Iterable[Message]) -> None:
        """Writes a line for each message, all in one piece."""
        data = memoryview(b"".join(_encode({k: v}).encode() + b"\n" for k, v in messages))
        try:
            # A pipe may take only part of the data; the lock keeps lines of two threads apart.
            with self._lock:
                while data:
                    data = data[os.write(self._out, data) :]
        except OSError:
            os._exit(0)  # the parent closed the pipe: nobody is left to report to

    def post(self, kind: str, content: Any) -> None:
        """Queues a message from a thread of this program as if the parent had sent it."""
        self._queue.put([(kind, content)])

    def heard(self, wait_s: float = 0) -> list[Message]:
        """Returns all messages since the last call.

        Args:
            wait_s: Longest wait for the first message, in seconds.
        """
        messages: list[Message] = []
        try:
            messages += self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait()
            while True:
                messages += self._queue.get_nowait()
        except Empty:
            return messages

    def _read(self) -> None:
        rest = b""
        while block := os.read(0, _BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            if lines:
                self._queue.put([item for line in lines for item in json.loads(line).items()])
        os._exit(0)  # at once: the parent is gone, and nobody wants the answers any more
