"""Pages of lists in OpenAI's shape: `limit` items after the last one of the previous page."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from serving.batches.database import Database
from serving.errors import NotFound

Page = dict[str, Any]


def page(
    database: Database,
    table: str,
    where: str,
    values: Sequence[str],
    after: str | None,
    limit: int,
    order: str,
    describe: Callable[[sqlite3.Row], dict[str, Any]],
) -> Page:
    """Returns a page of a table.

    Args:
        database: Database with the table.
        table: Name of the table.
        where: SQL condition for the rows of the list.
        values: Values of the condition's placeholders.
        after: Id of the last item of the previous page; None: the first page.
        limit: Items of the page, at most.
        order: `asc` or `desc`, by the time of creation.
        describe: Function that returns a row as the client sees it.

    Raises:
        NotFound: there is no item `after` in the list.
    """
    bound = ""
    if after is not None:
        query = f"SELECT seq FROM {table} WHERE {where} AND id = ?"
        rows = database.read(query, *values, after)
        if not rows:
            raise NotFound(f"there is no {after[:64]!r} in the list", "after")
        # `seq` and not the time, which several items may share.
        bound = f"AND seq {'>' if order == 'asc' else '<'} {rows[0]['seq']}"
    rows = database.read(
        f"SELECT * FROM {table} WHERE {where} {bound} ORDER BY seq {order} LIMIT ?",
        *values,
        limit + 1,  # the additional row tells whether there are more pages
    )
    data = [describe(row) for row in rows[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(rows) > limit,
    }
