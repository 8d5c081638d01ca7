"""Which lines of a batch are done: what makes each answer count exactly once.

A worker claims a line for a while, asks, and commits the answer. Claims only spare work: one that
runs out, since its worker was killed or is slow, is given to another, and then two may ask the
same. The commit decides: a line takes the first answer and no other.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from core.folder import sync
from serving.batches.batches import OPEN, set_status
from serving.batches.database import Database
from serving.batches.files import insert, new_id
from serving.batches.validate import check_file, parse


@dataclass(frozen=True)
class Line:
    """One request of a batch.

    Attributes:
        batch_id: Whose.
        number: From 1.
        custom_id: The client's name for it.
        owner: Id of the key that made the batch.
        url: Endpoint.
        body: Of the request.
    """

    batch_id: str
    number: int
    custom_id: str
    owner: str
    url: str
    body: dict[str, Any]


class Nothing(Enum):
    """Why there is no line to take."""

    CLAIMED = "others work on what is left"
    LEFT = "all lines are done, or no more are to be"


class Ledger:
    """The lines of all batches of a folder.

    Args:
        database: Of the folder.
        lease_s: A claim holds so long unless it is renewed.
    """

    def __init__(self, database: Database, lease_s: float) -> None:
        self._database, self.lease_s = database, lease_s

    def prepare(self, batch_id: str, max_lines: int) -> None:
        """Checks the input file and enters its lines, unless that was done: else it is failed.

        Raises:
            LookupError: There is no such batch.
        """
        batch = self._batch(batch_id)
        if batch is None:
            raise LookupError(f"{batch_id} is no batch of {self._database.folder}")
        if batch["status"] != "validating":
            return
        path = self._database.path(batch["input_file_id"])
        offsets, problems = check_file(path, batch["endpoint"], max_lines)
        with self._database.transaction() as transaction:
            status = "failed" if problems else "in_progress"
            if not set_status(transaction, status, "id = ? AND status = 'validating'", batch_id):
                return  # somebody else was faster, or it was cancelled
            if problems:
                errors = json.dumps([problem._asdict() for problem in problems])
                query = "UPDATE batches SET errors = ? WHERE id = ?"
                transaction.execute(query, (errors, batch_id))
                return
            query = "UPDATE batches SET total = ? WHERE id = ?"
            transaction.execute(query, (len(offsets), batch_id))
            transaction.executemany(
                "INSERT INTO lines (batch_id, number, offset) VALUES (?, ?, ?)",
                ((batch_id, number, offset) for number, offset in enumerate(offsets, 1)),
            )

    def take(self, batch_id: str, worker: str) -> Line | Nothing:
        """The next line that nobody works on, which is claimed; where none is left, all is sealed.

        A sealed batch takes no more answers: what is written of it cannot change.
        """
        now_s = time.time()
        with self._database.transaction() as transaction:
            query = "SELECT * FROM batches WHERE id = ?"
            batch = transaction.execute(query, (batch_id,)).fetchone()
            if batch is None or batch["status"] not in ("in_progress", "cancelling"):
                return Nothing.LEFT
            is_late = now_s >= batch["expires_at"]
            row = None
            if batch["status"] == "in_progress" and not is_late:
                row = transaction.execute(
                    "UPDATE lines SET worker = ?, claimed_until = ? WHERE batch_id = ? AND number ="
                    " (SELECT number FROM lines WHERE batch_id = ? AND result IS NULL"
                    " AND claimed_until <= ? ORDER BY number LIMIT 1) RETURNING number, offset",
                    (worker, now_s + self.lease_s, batch_id, batch_id, now_s),
                ).fetchone()
            if row is None:
                query = (
                    "SELECT COUNT(*), MAX(claimed_until) FROM lines"
                    " WHERE batch_id = ? AND result IS NULL"
                )
                undone, claimed_until = transaction.execute(query, (batch_id,)).fetchone()
                if undone and claimed_until > now_s:
                    return Nothing.CLAIMED
                cancelled = batch["status"] == "cancelling"
                _seal(
                    transaction,
                    batch_id,
                    "cancelled" if cancelled else "expired" if undone else "completed",
                )
                return Nothing.LEFT
        request = self._request(batch, row["offset"])
        return Line(
            batch_id,
            row["number"],
            request["custom_id"],
            batch["owner"],
            batch["endpoint"],
            request["body"],
        )

    def is_wanted(self, line: Line) -> bool:
        """Whether it pays to ask again: it is not done, and its batch goes on."""
        query = (
            "SELECT 1 FROM lines JOIN batches ON batches.id = batch_id WHERE batch_id = ?"
            f" AND number = ? AND result IS NULL AND status IN {OPEN} AND expires_at > ?"
        )
        return bool(self._database.read(query, line.batch_id, line.number, time.time()))

    def commit(self, line: Line, response: dict[str, Any]) -> bool:
        """Enters the answer to a line; False where it has one, and this is thrown away.

        Args:
            line: Which.
            response: Status, request id and body.
        """
        is_error = response["status_code"] != 200
        result = _result(line.batch_id, line.number, line.custom_id, response, None)
        with self._database.transaction() as transaction:
            done = transaction.execute(
                "UPDATE lines SET result = ?, is_error = ? WHERE batch_id = ? AND number = ?"
                " AND result IS NULL AND EXISTS (SELECT 1 FROM batches"
                " WHERE id = batch_id AND status IN ('in_progress', 'cancelling'))",
                (result, is_error, line.batch_id, line.number),
            )
            if done.rowcount == 0:
                return False
            column = "failed" if is_error else "completed"
            query = f"UPDATE batches SET {column} = {column} + 1 WHERE id = ?"
            transaction.execute(query, (line.batch_id,))
        return True

    def renew(self, worker: str) -> None:
        """A worker still works on what it claimed."""
        self._claim(worker, time.time() + self.lease_s)

    def release(self, worker: str) -> None:
        """A worker ends; what it claimed is another's to take."""
        self._claim(worker, 0.0)

    def give_up(self, line: Line, worker: str) -> None:
        """The same, for one line."""
        with self._database.transaction() as transaction:
            transaction.execute(
                "UPDATE lines SET claimed_until = 0"
                " WHERE batch_id = ? AND number = ? AND worker = ?",
                (line.batch_id, line.number, worker),
            )

    def finish(self, batch_id: str) -> None:
        """Writes the files of a sealed batch, unless that was done, and gives it its last status.

        Whoever writes them writes the same, to the same places, so that it may be begun again.
        """
        batch = self._batch(batch_id)
        if batch is None or batch["status"] != "finalizing":
            return
        output, errors = self._temporary(), self._temporary()
        try:
            sizes = self._write(batch, output, errors)
            with self._database.transaction() as transaction:
                is_sealed = "id = ? AND status = 'finalizing'"
                if not set_status(transaction, batch["outcome"], is_sealed, batch_id):
                    return
                columns = ("output_file_id", "error_file_id")
                for column, path, size in zip(columns, (output, errors), sizes, strict=True):
                    if size == 0:
                        query = f"UPDATE batches SET {column} = NULL WHERE id = ?"
                        transaction.execute(query, (batch_id,))
                        continue
                    id = batch[column]
                    path.rename(self._database.path(id))
                    sync(self._database.folder)
                    name = f"{batch_id}_{column.removesuffix('_file_id')}.jsonl"
                    insert(transaction, id, batch["owner"], "batch_output", name, size)
                transaction.execute("DELETE FROM lines WHERE batch_id = ?", (batch_id,))
        finally:
            output.unlink(missing_ok=True)
            errors.unlink(missing_ok=True)

    def _write(self, batch: sqlite3.Row, output: Path, errors: Path) -> tuple[int, int]:
        """The two files, each in the order of the input; returns their sizes in bytes."""
        with output.open("wb") as output_file, errors.open("wb") as error_file:
            number, rows = 0, self._rows(batch["id"], 0)
            while rows:
                for row in rows:
                    number, result = row["number"], row["result"]
                    if result is None:
                        result = self._unanswered(batch, row)
                    file = error_file if row["is_error"] or row["result"] is None else output_file
                    file.write(result.encode() + b"\n")
                rows = self._rows(batch["id"], number)
            sizes = output_file.tell(), error_file.tell()
        sync(output)
        sync(errors)
        return sizes

    def _rows(self, batch_id: str, after: int) -> list[sqlite3.Row]:
        query = "SELECT * FROM lines WHERE batch_id = ? AND number > ? ORDER BY number LIMIT 500"
        return self._database.read(query, batch_id, after)

    def _unanswered(self, batch: sqlite3.Row, row: sqlite3.Row) -> str:
        custom_id = self._request(batch, row["offset"])["custom_id"]
        outcome = batch["outcome"]
        message = f"the batch was {outcome} before the request was answered"
        if outcome == "expired":
            message = "the batch expired before the request was answered"
        error = {"code": f"batch_{outcome}", "message": message}
        return _result(batch["id"], row["number"], custom_id, None, error)

    def _request(self, batch: sqlite3.Row, offset: int) -> Any:
        with self._database.path(batch["input_file_id"]).open("rb") as file:
            file.seek(offset)
            return parse(file.readline())

    def _batch(self, batch_id: str) -> sqlite3.Row | None:
        rows = self._database.read("SELECT * FROM batches WHERE id = ?", batch_id)
        return rows[0] if rows else None

    def _claim(self, worker: str, until_s: float) -> None:
        with self._database.transaction() as transaction:
            transaction.execute(
                "UPDATE lines SET claimed_until = ? WHERE worker = ? AND result IS NULL",
                (until_s, worker),
            )

    def _temporary(self) -> Path:
        descriptor, name = tempfile.mkstemp(dir=self._database.folder, suffix=".jsonl")
        os.close(descriptor)
        return Path(name)


def _seal(transaction: sqlite3.Connection, batch_id: str, outcome: str) -> None:
    set_status(transaction, "finalizing", "id = ?", batch_id)
    transaction.execute(
        "UPDATE batches SET outcome = ?, output_file_id = ?, error_file_id = ? WHERE id = ?",
        (outcome, new_id("file-"), new_id("file-"), batch_id),
    )


def _result(
    batch_id: str,
    number: int,
    custom_id: str,
    response: dict[str, Any] | None,
    error: dict[str, str] | None,
) -> str:
    """A line of an output file."""
    id = f"batch_req_{batch_id.removeprefix('batch_')}_{number}"
    return json.dumps({"id": id, "custom_id": custom_id, "response": response, "error": error})
