"""Files that clients upload and batches write; a key sees only its own files."""

from __future__ import annotations

import secrets
import shutil
import sqlite3
import time
from pathlib import Path
from typing import IO, Any

from core.folder import staged_file
from serving.batches.database import Database
from serving.batches.pages import Page, page
from serving.errors import Conflict, NotFound

_UNFINISHED = "('validating', 'in_progress', 'cancelling', 'finalizing')"


def new_id(prefix: str) -> str:
    """Returns a random id that cannot be guessed."""
    return prefix + secrets.token_hex(16)


class Files:
    """The files of a folder.

    Args:
        database: Database of the folder.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, owner: str, filename: str, content: IO[bytes]) -> dict[str, Any]:
        """Stores an upload for batches; a file in the database is complete, also after a crash.

        Args:
            owner: Id of the key.
            filename: Client's name of the file, which is only shown and never a path here.
            content: Content, which is read from its current position.
        """
        id = new_id("file-")
        path = self._database.path(id)
        try:
            with staged_file(path) as staging, staging.open("xb") as file:
                shutil.copyfileobj(content, file, 2**20)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        with self._database.transaction() as transaction:
            insert(transaction, id, owner, "batch", filename[:255], path.stat().st_size)
        return self.get(owner, id)

    def get(self, owner: str, id: str) -> dict[str, Any]:
        """Returns a file in OpenAI's shape; raises NotFound if there is no such file."""
        rows = self._database.read("SELECT * FROM files WHERE id = ? AND owner = ?", id, owner)
        if not rows:
            raise _absent(id)
        return _described(rows[0])

    def path(self, owner: str, id: str) -> Path:
        """Returns the path of a file's content; raises NotFound if there is no such file."""
        return self._database.path(self.get(owner, id)["id"])

    def list_page(
        self, owner: str, purpose: str | None, after: str | None, limit: int, order: str
    ) -> Page:
        """Returns a page of a key's files; raises NotFound if there is no file `after`."""
        where, values = "owner = ?", [owner]
        if purpose is not None:
            where, values = where + " AND purpose = ?", [owner, purpose]
        return page(self._database, "files", where, values, after, limit, order, _described)

    def delete(self, owner: str, id: str) -> None:
        """Deletes a file.

        Raises:
            NotFound: there is no such file; 409: a batch still reads the file.
        """
        with self._database.transaction() as transaction:
            used = transaction.execute(
                "SELECT id FROM batches WHERE input_file_id = ? AND owner = ?"
                f" AND status IN {_UNFINISHED}",
                (id, owner),
            ).fetchone()
            if used is not None:
                raise Conflict(f"{used['id']} still reads the file", code="file_in_use")
            query = "DELETE FROM files WHERE id = ? AND owner = ? RETURNING id"
            row = transaction.execute(query, (id, owner)).fetchone()
            if row is None:
                raise _absent(id)
        # After the commit: a crash in between leaves a file without an entry, never the reverse.
        self._database.path(row["id"]).unlink(missing_ok=True)


def insert(
    transaction: sqlite3.Connection, id: str, owner: str, purpose: str, filename: str, size: int
) -> None:
    """Enters a file whose content is in the folder already."""
    transaction.execute(
        "INSERT INTO files (id, owner, purpose, filename, bytes, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (id, owner, purpose, filename, size, int(time.time())),
    )


def _described(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
    }


def _absent(id: str) -> NotFound:
    return NotFound(f"there is no file {id[:64]!r}", "file_id")
