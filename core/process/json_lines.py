"""The program's end of a pipe on which each line is a JSON object: `{kind: content}`.

What libraries print goes to standard error, so that nothing but such lines is on standard output.
Only the standard library is imported: a Python of another environment loads this file as well.
"""

import json
import os
import threading
from collections.abc import Iterable
from queue import Empty, SimpleQueue
from typing import Any

IDLE_S = 0.5  # a program with nothing to do says so this often, as a sign of life
_BLOCK_BYTES = 1 << 20
_encode = json.JSONEncoder(separators=(",", ":")).encode
Message = tuple[str, Any]  # kind and content


class JsonLines:
    """Standard input and output of a program, which ends when its parent is gone."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)  # what libraries print is not for the parent
        self._queue: SimpleQueue[list[Message]] = SimpleQueue()
        self._lock = threading.Lock()
        # A thread of its own sees that the parent is gone even while the program computes.
        threading.Thread(target=self._read, daemon=True).start()

    def say(self, kind: str, content: Any) -> None:
        """Writes one line."""
        self.say_all([(kind, content)])

    def say_all(self, messages: Iterable[Message]) -> None:
        """Writes a line for each message, all at once."""
        data = memoryview(b"".join(_encode({k: v}).encode() + b"\n" for k, v in messages))
        try:
            with self._lock:
                while data:
                    data = data[os.write(self._out, data) :]
        except OSError:
            os._exit(0)

    def post(self, kind: str, content: Any) -> None:
        """Lets a thread of the program be heard beside the parent."""
        self._queue.put([(kind, content)])

    def heard(self, wait_s: float = 0) -> list[Message]:
        """Returns all that was said since; waits for the first message while there is none.

        Args:
            wait_s: How long it waits, in seconds.
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
        os._exit(0)  # at once: the parent is gone, and so is whoever wanted the answers
