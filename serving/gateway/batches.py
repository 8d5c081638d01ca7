"""The routes of files and batches."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from serving.batches.batches import Batches
from serving.batches.database import Database
from serving.batches.files import Files
from serving.batches.queue import Queue
from serving.errors import InvalidRequest, Unavailable
from serving.gateway.gateway import Gateway
from serving.gateway.incoming import key_of

_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"const": "batch"},
                    },
                }
            }
        },
    }
}


class BatchRequest(BaseModel):
    """Body of `/v1/batches`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str = Field(max_length=64)
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None


def add_batches(app: FastAPI, gateway: Gateway, database: Database, queue: Queue) -> None:
    """Adds the routes of files and batches to an app.

    Args:
        app: App of the clients.
        gateway: State of the server, which authorizes requests.
        database: Database of files and batches.
        queue: Queue that new batches are put into.
    """
    _add_files(app, gateway, Files(database))
    _add_batches(app, gateway, Batches(database), queue)


def _add_files(app: FastAPI, gateway: Gateway, files: Files) -> None:
    @app.post("/v1/files", tags=["batches"], openapi_extra=_UPLOAD)
    async def create_file(request: Request) -> dict[str, Any]:
        """Stores a file of requests, one JSON object a line."""
        owner = key_of(gateway, request).id
        async with request.form(max_files=1, max_fields=4) as form:
            for name in form.keys() - {"file", "purpose"}:
                raise InvalidRequest(f"{name[:64]}: is not supported", name[:64])
            content, purpose = form.get("file"), form.get("purpose")
            if not isinstance(content, UploadFile):
                raise InvalidRequest("file: is missing in the form", "file")
            if purpose != "batch":
                raise InvalidRequest("purpose: only batch is supported", "purpose")
            name = content.filename or "file"
            return await asyncio.to_thread(files.add, owner, name, content.file)

    @app.get("/v1/files", tags=["batches"])
    async def list_files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """Returns a page of the key's files."""
        owner = key_of(gateway, request).id
        return await asyncio.to_thread(files.list_page, owner, purpose, after, limit, order)

    @app.get("/v1/files/{file_id}", tags=["batches"])
    async def file(file_id: str, request: Request) -> dict[str, Any]:
        """Returns one file's description."""
        owner = key_of(gateway, request).id
        return await asyncio.to_thread(files.get, owner, file_id)

    @app.get("/v1/files/{file_id}/content", tags=["batches"], response_class=FileResponse)
    async def content(file_id: str, request: Request) -> FileResponse:
        """Returns a file's content."""
        owner = key_of(gateway, request).id
        path = await asyncio.to_thread(files.path, owner, file_id)
        return FileResponse(path, media_type="application/octet-stream")

    @app.delete("/v1/files/{file_id}", tags=["batches"])
    async def delete_file(file_id: str, request: Request) -> dict[str, Any]:
        """Deletes a file, unless a batch still reads it."""
        owner = key_of(gateway, request).id
        await asyncio.to_thread(files.delete, owner, file_id)
        return {"id": file_id, "object": "file", "deleted": True}


def _add_batches(app: FastAPI, gateway: Gateway, batches: Batches, queue: Queue) -> None:
    @app.post("/v1/batches", tags=["batches"])
    async def create_batch(body: BatchRequest, request: Request) -> dict[str, Any]:
        """Creates a batch, whose requests are answered within a day."""
        owner = key_of(gateway, request).id
        batch = await asyncio.to_thread(
            batches.create, owner, body.input_file_id, body.endpoint, body.metadata
        )
        try:
            await queue.put(batch["id"])
        except ConnectionError as e:
            # The client gets an error, so the batch must not run later.
            await asyncio.to_thread(batches.forget, batch["id"])
            raise Unavailable("the queue is not available now", None, "queue", 5) from e
        return batch

    @app.get("/v1/batches", tags=["batches"])
    async def list_batches(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> dict[str, Any]:
        """Returns a page of the key's batches, newest first."""
        owner = key_of(gateway, request).id
        return await asyncio.to_thread(batches.list_page, owner, after, limit)

    @app.get("/v1/batches/{batch_id}", tags=["batches"])
    async def batch(batch_id: str, request: Request) -> dict[str, Any]:
        """Returns a batch: its status, counts and result files."""
        owner = key_of(gateway, request).id
        return await asyncio.to_thread(batches.get, owner, batch_id)

    @app.post("/v1/batches/{batch_id}/cancel", tags=["batches"])
    async def cancel(batch_id: str, request: Request) -> dict[str, Any]:
        """Cancels a batch; requests that have begun are completed."""
        owner = key_of(gateway, request).id
        return await asyncio.to_thread(batches.cancel, owner, batch_id)
