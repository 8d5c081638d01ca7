"""Batches as clients see them: creates, describes, lists and cancels them."""

from __future__ import annotations

import json
import sqlite3
import time
from typing import Any

from serving.batches.database import Database
from serving.batches.files import new_id
from serving.batches.pages import Page, page
from serving.errors import Conflict, NotFound

WINDOW_S = 24 * 3600
OPEN = "('validating', 'in_progress')"  # statuses in which lines may still be started


class Batches:
    """The batches of a folder.

    Args:
        database: Database of the folder.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, owner: str, input_file_id: str, endpoint: str, metadata: dict[str, str] | None
    ) -> dict[str, Any]:
        """Creates a batch, whose file is checked later.

        Raises:
            NotFound: there is no such file.
        """
        id, now_s = new_id("batch_"), int(time.time())
        with self._database.transaction() as transaction:
            file = transaction.execute(
                "SELECT id FROM files WHERE id = ? AND owner = ? AND purpose = 'batch'",
                (input_file_id, owner),
            ).fetchone()
            if file is None:
                text = f"there is no file {input_file_id[:64]!r} of purpose batch"
                raise NotFound(text, "input_file_id")
            transaction.execute(
                "INSERT INTO batches"
                " (id, owner, status, endpoint, input_file_id, created_at, expires_at, metadata)"
                " VALUES (?, ?, 'validating', ?, ?, ?, ?, ?)",
                (
                    id,
                    owner,
                    endpoint,
                    input_file_id,
                    now_s,
                    now_s + WINDOW_S,
                    None if metadata is None else json.dumps(metadata),
                ),
            )
        return self.get(owner, id)

    def get(self, owner: str, id: str) -> dict[str, Any]:
        """Returns a batch in OpenAI's shape; raises NotFound if there is no such batch."""
        rows = self._database.read("SELECT * FROM batches WHERE id = ? AND owner = ?", id, owner)
        if not rows:
            raise NotFound(f"there is no batch {id[:64]!r}", "batch_id")
        return _described(rows[0])

    def list_page(self, owner: str, after: str | None, limit: int) -> Page:
        """Returns a page of a key's batches, newest first.

        Raises:
            NotFound: there is no batch `after`.
        """
        where = "owner = ?"
        return page(self._database, "batches", where, [owner], after, limit, "desc", _described)

    def cancel(self, owner: str, id: str) -> dict[str, Any]:
        """Cancels a batch, so that no more of its lines are started.

        Raises:
            NotFound: there is no such batch; 409: the batch has ended.
        """
        with self._database.transaction() as transaction:
            is_open = f"id = ? AND owner = ? AND status IN {OPEN}"
            set_status(transaction, "cancelling", is_open, id, owner)
        batch = self.get(owner, id)
        if batch["status"] not in ("cancelling", "cancelled"):
            raise Conflict(f"the batch is {batch['status']} already", code="batch_ended")
        return batch

    def forget(self, id: str) -> None:
        """Deletes a batch that could not be queued."""
        with self._database.transaction() as transaction:
            transaction.execute("DELETE FROM batches WHERE id = ?", (id,))

    def unfinished(self) -> list[str]:
        """Returns the ids of all batches that have not ended, oldest first."""
        query = "SELECT id FROM batches WHERE status IN ('validating', 'in_progress', 'cancelling',"
        return [row["id"] for row in self._database.read(query + " 'finalizing') ORDER BY seq")]


def set_status(
    transaction: sqlite3.Connection, status: str, where: str, *values: str | float
) -> bool:
    """Sets a batch's status and its time; returns False if no batch matches `where`.

    The condition and the change are one statement, so of several processes only one succeeds.
    """
    query = (
        "UPDATE batches SET status = ?, times = json_set(times, ?, CAST(? AS INTEGER))"
        f" WHERE {where}"
    )
    noted = (status, f"$.{status}_at", time.time())
    return transaction.execute(query, (*noted, *values)).rowcount == 1


def _described(row: sqlite3.Row) -> dict[str, Any]:
    times = json.loads(row["times"])
    # The ids are set when a batch is sealed, but the files exist only when it has ended.
    has_ended = row["status"] in ("completed", "expired", "cancelled")
    errors = None if row["errors"] is None else json.loads(row["errors"])
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "errors": None if errors is None else {"object": "list", "data": errors},
        "input_file_id": row["input_file_id"],
        "completion_window": "24h",
        "status": row["status"],
        "output_file_id": row["output_file_id"] if has_ended else None,
        "error_file_id": row["error_file_id"] if has_ended else None,
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        **{
            f"{status}_at": times.get(f"{status}_at")
            for status in (
                "in_progress",
                "finalizing",
                "completed",
                "failed",
                "expired",
                "cancelling",
                "cancelled",
            )
        },
        "request_counts": {key: row[key] for key in ("total", "completed", "failed")},
        "metadata": None if row["metadata"] is None else json.loads(row["metadata"]),
    }
