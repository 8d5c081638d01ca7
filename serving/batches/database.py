"""The folder of files and batches: an SQLite database for what is known, files for contents.

Workers in other processes open the same folder, so they run on the gateway's host: SQLite's
write-ahead log needs shared memory. Whatever must not happen twice is one conditional UPDATE in a
transaction; no process has to live for it to hold.
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
    times TEXT NOT NULL DEFAULT '{}',      -- when each status came, as in_progress_at
    metadata TEXT,
    errors TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS lines (
    batch_id TEXT NOT NULL,
    number INTEGER NOT NULL,               -- from 1, as the input file has them
    offset INTEGER NOT NULL,               -- in the input file
    worker TEXT,                           -- who works on it, until claimed_until
    claimed_until REAL NOT NULL DEFAULT 0,
    result TEXT,                           -- NULL: not done
    is_error INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch_id, number)
);
CREATE INDEX IF NOT EXISTS undone ON lines (batch_id, number) WHERE result IS NULL;
"""
DATABASE = "batches.sqlite3"
_BUSY_TIMEOUT_S = 60.0  # another process writes; 50,000 new lines take about a second


class Database:
    """One connection, for all threads of a process.

    Args:
        folder: Made if need be.

    Attributes:
        folder: Where all of it lies.

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
                isolation_level=None,
                check_same_thread=False,
            )
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as e:
            raise ConfigError("batches.dir", folder, str(e), "give a folder to write to") from e

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing of what is done within, and nothing of others in between."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def read(self, query: str, *values: object) -> list[sqlite3.Row]:
        """The rows of one SELECT."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def path(self, file_id: str) -> Path:
        """Of a file's content; the id is one of the database, never what a client sent."""
        return self.folder / "files" / file_id

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            self._connection.close()
