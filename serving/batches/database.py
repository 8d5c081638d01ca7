"""The folder of files and batches: an SQLite database for their state, and files for contents.

Worker processes open the same folder, so they run on the gateway's host: SQLite's write-ahead log
needs shared memory. Anything that must happen only once is one conditional UPDATE in a transaction,
which holds whichever process dies.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import ConfigError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    purpose TEXT NOT NULL,
    filename TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    outcome TEXT,                          -- the status that follows finalizing
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    output_file_id TEXT,
    error_file_id TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    times TEXT NOT NULL DEFAULT '{}',      -- time of each status, such as in_progress_at
    metadata TEXT,
    errors TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS lines (
    batch_id TEXT NOT NULL,
    number INTEGER NOT NULL,               -- of the line in the input file, from 1
    offset INTEGER NOT NULL,               -- in the input file
    worker TEXT,                           -- has claimed the line until claimed_until
    claimed_until REAL NOT NULL DEFAULT 0,
    result TEXT,                           -- NULL: not done
    is_error INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch_id, number)
);
CREATE INDEX IF NOT EXISTS undone ON lines (batch_id, number) WHERE result IS NULL;
"""
DATABASE = "batches.sqlite3"
_BUSY_TIMEOUT_S = 60.0  # while another process writes; 50,000 new lines take about a second


class Database:
    """A connection that is shared by all threads of a process.

    Args:
        folder: Folder of the database, which is created if it does not exist.

    Attributes:
        folder: Folder of the database and of the contents.

    Raises:
        ConfigError: The folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / "files").mkdir(exist_ok=True, mode=0o700)
            self._connection = sqlite3.connect(
                folder / DATABASE,
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,  # transactions are begun and ended explicitly below
                check_same_thread=False,
            )
            self._connection.row_factory = sqlite3.Row
            # Readers do not block the writer; and a commit is on disk when it returns, which WAL
            # by itself does not guarantee after a power failure.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as e:
            raise ConfigError("batches.dir", folder, str(e), "give a folder to write to") from e

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Runs a write transaction: atomic, and isolated from other threads and processes."""
        with self._lock:
            # IMMEDIATE takes the write lock now: a transaction that reads first and then writes
            # could otherwise fail as busy without waiting.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def read(self, query: str, *values: object) -> list[sqlite3.Row]:
        """Returns the rows of a SELECT."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def path(self, file_id: str) -> Path:
        """Returns the path of a file's content; the id must be from the database, not a client."""
        return self.folder / "files" / file_id

    def close(self) -> None:
        """Closes the connection."""
        with self._lock:
            self._connection.close()
