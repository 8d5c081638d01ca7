"""The ledger of a batch's lines, which makes each answer count exactly once.

A worker claims a line for a limited time, sends it, and commits the answer. Claims only avoid
duplicate work: if one expires because its worker was killed or is slow, another worker gets the
line, and both may send it. The commit decides: a line keeps the first answer and no other.
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
    """A request of a batch.

    Attributes:
        batch_id: Id of the batch.
        number: Number of the line in the input file, from 1.
        custom_id: Client's name for the request.
        owner: Id of the key that created the batch.
        url: Endpoint of the request.
        body: Body of the request.
    """

    batch_id: str
    number: int
    custom_id: str
    owner: str
    url: str
    body: dict[str, Any]


class Nothing(Enum):
    """Reason why there is no line to take."""

    CLAIMED = "other workers have claimed all remaining lines"
    LEFT = "all lines are done, or no more are to be started"


class Ledger:
    """The lines of all batches of a folder.

    Args:
        database: Database of the folder.
        lease_s: Seconds after which a claim expires unless it is renewed.
    """

    def __init__(self, database: Database, lease_s: float) -> None:
        self._database, self.lease_s = database, lease_s

    def prepare(self, batch_id: str, max_lines: int) -> None:
        """Checks the input file and enters its lines, unless that was done before.

        A batch with an invalid file gets the status `failed`.

        Raises:
            LookupError: There is no such batch.
        """
        batch = self._batch(batch_id)
        if batch is None:
            raise LookupError(f"{batch_id} is not a batch of {self._database.folder}")
        if batch["status"] != "validating":
            return
        path = self._database.path(batch["input_file_id"])
        offsets, problems = check_file(path, batch["endpoint"], max_lines)
        with self._database.transaction() as transaction:
            status = "failed" if problems else "in_progress"
            if not set_status(transaction, status, "id = ? AND status = 'validating'", batch_id):
                return  # another worker was faster, or the batch was cancelled
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
        """Claims and returns the next line that no worker has; seals the batch if none is left.

        A sealed batch accepts no more answers, so that its result files cannot change.
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
                # Also an expired or cancelled batch waits for answers that are on their way.
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
        """Returns whether a line should be sent again: it is not done, and its batch goes on."""
        query = (
            "SELECT 1 FROM lines JOIN batches ON batches.id = batch_id WHERE batch_id = ?"
            f" AND number = ? AND result IS NULL AND status IN {OPEN} AND expires_at > ?"
        )
        return bool(self._database.read(query, line.batch_id, line.number, time.time()))

    def commit(self, line: Line, response: dict[str, Any]) -> bool:
        """Enters the answer to a line; returns False, and drops it, if there is one already.

        Args:
            line: Line that is answered.
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
        """Extends the claims of a worker that still works on its lines."""
        self._claim(worker, time.time() + self.lease_s)

    def release(self, worker: str) -> None:
        """Ends the claims of a worker, so that others can take its lines at once."""
        self._claim(worker, 0.0)

    def give_up(self, line: Line, worker: str) -> None:
        """Ends the claim of a worker on one line."""
        with self._database.transaction() as transaction:
            transaction.execute(
                "UPDATE lines SET claimed_until = 0"
                " WHERE batch_id = ? AND number = ? AND worker = ?",
                (line.batch_id, line.number, worker),
            )

    def finish(self, batch_id: str) -> None:
        """Writes the result files of a sealed batch and sets its last status, unless that was done.

        Every worker would write the same to the same paths, so a crash in the middle does no harm.
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
                    # The file is in place before the commit makes it visible.
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
        """Writes the two result files in the order of the input; returns their sizes in bytes."""
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
    # The ids of the result files are fixed here, so that every worker writes to the same paths.
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
    """Returns a line of a result file."""
    id = f"batch_req_{batch_id.removeprefix('batch_')}_{number}"
    return json.dumps({"id": id, "custom_id": custom_id, "response": response, "error": error})
