"""Reads files from the disks of other machines of a run, by byte ranges.

One rank of each disk answers over HTTP, at the address by which the ranks reach each other. A
random token, told through the ranks' own store, keeps out whoever is not a rank. What is read is
not encrypted, like the gradients; the caller verifies digests.
"""

from __future__ import annotations

import hmac
import http.client
import os
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

from parallel.disks import Disks
from parallel.world import World

_TIMEOUT_S = 60.0  # of one read or write; a machine that is slower than that counts as gone
# Strangers are those that have connected and not shown the token yet.
_STRANGER_S = 10.0
_MAX_STRANGERS = 256


class PeerFiles:
    """Serves folders of this disk to the other ranks, and reads from theirs; a context manager.

    Opening and closing are collective. `read` and `size_of` may be called from any thread.

    Args:
        world: Ranks of the run.
        disks: The disks of the ranks; the leader of each disk answers.
        folders: Folders that are served, by the name that readers use.
    """

    def __init__(self, world: World, disks: Disks, folders: Mapping[str, Path]) -> None:
        self._world, self._disks, self._folders = world, disks, dict(folders)
        self._server: _Server | None = None
        self._addresses: dict[int, tuple[str, int, str]] = {}
        self._connections: dict[tuple[int, int], http.client.HTTPConnection] = {}

    def __enter__(self) -> PeerFiles:
        own = None
        if self._disks.is_leader and not self._disks.is_shared:
            token = secrets.token_hex(16)
            self._server = _Server(self._world.address, token, self._folders)
            own = (self._world.address, self._server.server_address[1], token)
        told = self._world.gather(own)
        self._addresses = {rank: address for rank, address in enumerate(told) if address}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an error of this rank alone the others are lost as well, and nobody would come.
        if error is None or getattr(error, "seen_by_all", False):
            self._world.barrier()  # others may still read from here
        if self._server is not None:
            self._server.close()

    def serve(self, name: str, folder: Path) -> None:
        """Serves one more folder; the others may read from it once they have been told."""
        self._folders[name] = folder

    def size_of(self, rank: int, folder: str, path: str) -> int:
        """Returns the size of a file on another disk, in bytes.

        Args:
            rank: Leader of that disk.
            folder: Name of the folder, as its owner serves it.
            path: Path of the file in it.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The machine does not answer.
        """
        response, _ = self._ask(rank, "HEAD", folder, path, {})
        return int(response.headers["Content-Length"])

    def read(self, rank: int, folder: str, path: str, offset: int, length: int) -> bytes:
        """Returns a byte range of a file on another disk.

        Args:
            rank: Leader of that disk.
            folder: Name of the folder, as its owner serves it.
            path: Path of the file in it.
            offset: Position of the first byte.
            length: Number of bytes, above 0.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The machine does not answer, or the file is shorter.
        """
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}"}
        _, content = self._ask(rank, "GET", folder, path, wanted)
        if len(content) != length:
            raise OSError(f"{path} of rank {rank}: got {len(content)} of {length} bytes")
        return content

    def _ask(
        self, rank: int, method: str, folder: str, path: str, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        host, port, token = self._addresses[rank]
        url = f"/{quote(folder, safe='')}/{quote(path)}"
        headers = {"Authorization": token, **headers}
        try:
            try:
                response, content = self._request(rank, method, url, headers)
            except (http.client.HTTPException, OSError):
                # A kept connection may have ended since; the second request opens a new one.
                response, content = self._request(rank, method, url, headers)
        except (http.client.HTTPException, OSError) as e:
            where = f"rank {rank} on {self._disks.hosts[rank]} ({host})"
            raise OSError(f"{where} does not answer: {e or type(e).__name__}") from e
        if response.status == HTTPStatus.NOT_FOUND:
            raise FileNotFoundError(f"{path} is not on the disk of {self._disks.hosts[rank]}")
        if response.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            raise OSError(f"{path} of rank {rank}: {response.status} {response.reason}")
        return response, content

    def _request(
        self, rank: int, method: str, url: str, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Sends a request over this thread's connection to a rank, which is kept."""
        host, port, _ = self._addresses[rank]
        key = (threading.get_ident(), rank)
        connection = self._connections.get(key)
        if connection is None:
            connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
            self._connections[key] = connection
        try:
            connection.request(method, url, headers=headers)
            response = connection.getresponse()
            return response, response.read()
        except BaseException:
            connection.close()
            raise


class _Server(ThreadingHTTPServer):
    """Answers requests for byte ranges of files below `folders`."""

    daemon_threads = True
    block_on_close = False  # a connection that its peer keeps open must not keep this process

    def __init__(self, address: str, token: str, folders: Mapping[str, Path]) -> None:
        self.token, self.folders = token, folders
        self._strangers: dict[socket.socket, float] = {}  # when each came, the oldest first
        self.address_family = socket.getaddrinfo(address, 0)[0][0]
        super().__init__((address, 0), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, name="peers", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Binds to the address; HTTPServer would ask for its name as well, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers a new connection in a thread of its own."""
        self._strangers[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Hangs up on strangers; called twice a second and after each new connection.

        Where there are too many it is the oldest who go, since a rank shows its token at once.
        """
        strangers, now = list(self._strangers.items()), time.monotonic()
        for i, (connection, since) in enumerate(strangers):
            if i < len(strangers) - _MAX_STRANGERS or now - since > _STRANGER_S:
                self.forget(connection)
                with suppress(OSError):  # it has ended meanwhile
                    connection.shutdown(socket.SHUT_RDWR)  # which ends its thread

    def forget(self, stranger: socket.socket) -> None:
        """Counts a connection no more among the strangers."""
        self._strangers.pop(stranger, None)

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection."""
        self.forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: a peer that has gone is reported by what it leaves undone."""

    def close(self) -> None:
        """Answers no more."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections
    timeout = _TIMEOUT_S * 10  # a peer may be busy between two reads, and then connects again
    server: _Server

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _answer(self, with_content: bool) -> None:
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        self.server.forget(self.connection)
        path = self._path()
        try:
            if path is None:
                raise FileNotFoundError
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                first, last = self._range(size)
                file.seek(first)
                content = file.read(last - first + 1) if with_content else b""
        except (OSError, ValueError):
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if with_content else HTTPStatus.OK)
        self.send_header("Content-Length", str(len(content) if with_content else size))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _path(self) -> Path | None:
        """Returns the path of the wanted file; None if it is outside of what is served."""
        name, _, inside = self.path.lstrip("/").partition("/")
        folder = self.server.folders.get(unquote(name))
        if folder is None:
            return None
        root = folder.resolve()
        path = (root / unquote(inside)).resolve()
        return path if path.is_relative_to(root) else None

    def _range(self, size: int) -> tuple[int, int]:
        """Returns positions of the first and the last wanted byte."""
        unit, _, wanted = self.headers.get("Range", "bytes=0-").partition("=")
        first, _, last = wanted.partition("-")
        if unit != "bytes":
            raise ValueError
        return int(first), min(size, int(last or size) + 1) - 1
