"""Reads files that are not on this disk: in verified blocks of 8 MiB, or as a whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from core.errors import DamagedError, SpotforgeError
from core.folder import BLOCK_BYTES, Entry, HashedFile

# Reads `length` bytes at `offset`; raises OSError or SpotforgeError where it cannot.
ReadRange = Callable[[int, int], bytes]


class DistantFile:
    """Represents a file that other machines or an object store have.

    Each block is fetched once for all processes of this machine: it is kept in a file of full size
    with holes, beside a file that marks which blocks are there. Both are below a staging folder,
    which somebody else removes.

    Args:
        name: Path of the file in its checkpoint, for messages.
        entry: Entry of the file in the manifest, with blocks.
        sources: Places that have the file, each with a function that reads there, the best first.
        kept: Path of the file with the blocks that were fetched.
    """

    def __init__(
        self, name: str, entry: Entry, sources: Sequence[tuple[str, ReadRange]], kept: Path
    ) -> None:
        self._name, self._entry, self._sources, self._kept = name, entry, sources, kept
        self._marks = kept.with_name(f"{kept.name}.blocks")

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self._entry["size_bytes"]

    def open(self) -> io.BufferedReader:
        """Opens the file for reading; what is read is fetched and verified then."""
        return io.BufferedReader(_Stream(self), buffer_size=1 << 16)

    def read(self, offset: int, length: int) -> bytes:
        """Returns a byte range, which is shorter at the end of the file.

        Raises:
            DamagedError: A source has a block that does not match its digest, and no other has it.
            SpotforgeError: No source answers.
        """
        end = min(offset + length, self.size_bytes)
        pieces = []
        while offset < end:
            index, start = divmod(offset, BLOCK_BYTES)
            stop = min(BLOCK_BYTES, start + end - offset)
            pieces.append(self._block(index, start, stop))
            offset += stop - start
        return b"".join(pieces)

    def _block(self, index: int, start: int, stop: int) -> bytes:
        """Returns a part of a block, which is fetched if no process of this machine has."""
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        marks = os.open(self._marks, os.O_RDWR | os.O_CREAT, 0o644)
        kept = os.open(self._kept, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with _locked_byte(marks, index):
                if os.pread(marks, 1, index) != b"\1":
                    content = self._fetched(index)
                    if os.pwrite(kept, content, index * BLOCK_BYTES) != len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._kept))
                    os.pwrite(marks, b"\1", index)
            return os.pread(kept, stop - start, index * BLOCK_BYTES + start)
        finally:
            os.close(kept)
            os.close(marks)

    def _fetched(self, index: int) -> bytes:
        offset = index * BLOCK_BYTES
        length = min(BLOCK_BYTES, self.size_bytes - offset)
        problems = _Problems(self._name)
        for name, read in self._sources:
            try:
                content = read(offset, length)
            except (OSError, SpotforgeError) as e:
                problems.add(name, e)
                continue
            if hashlib.sha256(content).hexdigest() == self._entry["blocks"][index]:
                return content
            problems.add(name, None)
        raise problems.error()


class _Stream(io.RawIOBase):
    """A file object that reads from a `DistantFile`."""

    def __init__(self, file: DistantFile) -> None:
        super().__init__()
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {
            io.SEEK_SET: 0,
            io.SEEK_CUR: self._position,
            io.SEEK_END: self._file.size_bytes,
        }[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        content = self._file.read(self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def fetch(name: str, entry: Entry, sources: Iterable[tuple[str, ReadRange]], path: Path) -> None:
    """Writes a file that is elsewhere to this disk, and verifies it.

    Args:
        name: Path of the file in its checkpoint, for messages.
        entry: Entry of the file in the manifest.
        sources: Places that have the file, the best first.
        path: Path to write.

    Raises:
        DamagedError: No source has the file as the manifest describes it, and one has another.
        SpotforgeError: No source answers.
        OSError: The file cannot be written.
    """
    problems = _Problems(name)
    for source, read in sources:
        file = HashedFile(path)
        try:
            for offset in range(0, entry["size_bytes"], BLOCK_BYTES):
                try:
                    content = read(offset, min(BLOCK_BYTES, entry["size_bytes"] - offset))
                except (OSError, SpotforgeError) as e:
                    problems.add(source, e)
                    break
                file.write(content)
            else:
                if file.finish()["sha256"] == entry["sha256"]:
                    return
                problems.add(source, None)
        finally:
            file.close()
    raise problems.error()


class _Problems:
    """Collects why a file could be read from none of its sources."""

    def __init__(self, file: str) -> None:
        self._file, self._found, self._is_damaged = file, list[str](), False

    def add(self, source: str, error: Exception | None) -> None:
        """Adds what a source answered; None: something else than the manifest describes."""
        if error is None or isinstance(error, FileNotFoundError | DamagedError):
            self._is_damaged = True
        self._found.append(f"{source}: {error or 'does not match its SHA-256'}")

    def error(self) -> SpotforgeError:
        """Returns the error to raise."""
        rule = f"cannot be read: {'; '.join(self._found) or 'no machine has it'}"
        if self._is_damaged:
            fix = "remove that checkpoint, or resume from another one"
            return DamagedError("resume", self._file, rule, fix)
        return SpotforgeError(f"{self._file} {rule}")


@contextmanager
def _locked_byte(descriptor: int, index: int) -> Iterator[None]:
    """Locks one byte of a file against other processes, which wait."""
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, index)
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, index)
