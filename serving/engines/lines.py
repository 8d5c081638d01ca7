"""How an engine program talks: one JSON object a line. Standard library only, as it runs anywhere.

Everything else that is printed, by whatever library, goes to standard error.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any

IDLE_S = 0.5  # between two signs of life


class Lines:
    """Standard input and output of an engine program, which end it when the gateway is gone."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1 << 16)
        os.dup2(2, 1)  # what libraries print is not for the gateway
        self._queue: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def say(self, kind: str, content: Any) -> None:
        """Writes one line; an engine whose gateway is gone exits."""
        line = json.dumps({kind: content}, separators=(",", ":"))
        try:
            with self._lock:
                self._out.write(line + "\n")
                self._out.flush()
        except OSError:
            os._exit(0)

    def post(self, kind: str, content: Any) -> None:
        """Has a thread of the program heard beside the gateway."""
        self._queue.put({kind: content})

    def heard(self, wait_s: float = 0) -> Iterator[tuple[str, Any]]:
        """All that was said to the program; waits for the first when nothing was.

        Args:
            wait_s: How long, in seconds.
        """
        try:
            message = self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait()
            while True:
                yield from message.items()
                message = self._queue.get_nowait()
        except Empty:
            return

    def _read(self) -> None:
        for line in sys.stdin:
            self._queue.put(json.loads(line))
        os._exit(0)  # at once: the gateway is gone, and so is whoever wanted the tokens
