"""Files that clients upload and batches write; a key sees its own."""

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
from serving.gateway.errors import ApiError

_UNFINISHED = "('validating', 'in_progress', 'cancelling', 'finalizing')"


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return prefix + secrets.token_hex(16)


class Files:
    """The files of a folder."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, owner: str, filename: str, content: IO[bytes]) -> dict[str, Any]:
        """Takes an upload for batches; whoever sees its id sees all of it, after a crash as well.

        Args:
            owner: Id of the key.
            filename: As the client calls it; it names nothing here.
            content: Read from where it stands.
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
        """As OpenAI describes a file; raises ApiError 404."""
        rows = self._database.read("SELECT * FROM files WHERE id = ? AND owner = ?", id, owner)
        if not rows:
            raise _absent(id)
        return _described(rows[0])

    def path(self, owner: str, id: str) -> Path:
        """Of the content; raises ApiError 404."""
        return self._database.path(self.get(owner, id)["id"])

    def list_page(
        self, owner: str, purpose: str | None, after: str | None, limit: int, order: str
    ) -> Page:
        """A page of the key's files; raises ApiError 404 where there is no file `after`."""
        where, values = "owner = ?", [owner]
        if purpose is not None:
            where, values = where + " AND purpose = ?", [owner, purpose]
        return page(self._database, "files", where, values, after, limit, order, _described)

    def delete(self, owner: str, id: str) -> None:
        """Raises ApiError: 404, or 409 while a batch still reads it."""
        with self._database.transaction() as transaction:
            used = transaction.execute(
                "SELECT id FROM batches WHERE input_file_id = ? AND owner = ?"
                f" AND status IN {_UNFINISHED}",
                (id, owner),
            ).fetchone()
            if used is not None:
                raise ApiError(409, f"{used['id']} still reads the file", code="file_in_use")
            query = "DELETE FROM files WHERE id = ? AND owner = ? RETURNING id"
            row = transaction.execute(query, (id, owner)).fetchone()
            if row is None:
                raise _absent(id)
        self._database.path(row["id"]).unlink(missing_ok=True)


def insert(
    transaction: sqlite3.Connection, id: str, owner: str, purpose: str, filename: str, size: int
) -> None:
    """Makes a file known whose content lies there."""
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


def _absent(id: str) -> ApiError:
    return ApiError(404, f"there is no file {id[:64]!r}", "file_id")
