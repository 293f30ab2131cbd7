"""Multipart bodies taken apart as they come: short fields are kept, files go where the page that asked says.

The framework's own parser would keep the files in memory or in /tmp, unbounded.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from app.errors import BadInput, Full, TooLarge

Place = Callable[[list[str], str], Path | None]
"""Takes the folders a file came with and its name, returns where it goes; None drops its bytes."""

SLACK_BYTES = 2**22
"""What a body may hold beside the files: fields, names and boundaries."""
_WRITE_BYTES = 2**20
_MAX_FIELD_BYTES = 4000
_MAX_FIELDS = 64


class Form:
    """One body, read once."""

    def __init__(
        self, fields: dict[str, str], place: Place, *, max_bytes: int, setting: str, what: str, max_files: int
    ) -> None:
        self._fields = fields
        self._place = place
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._setting, self._what = setting, what
        self._n_bytes = self._n_files = self._n_fields = 0
        self._header, self._value, self._disposition = b"", b"", b""
        self._field = ""
        self._out: IO[bytes] | None = None

    async def read(self, request: Request) -> None:
        """Read the body to its end. Raises TooLarge in its middle, BadInput for what is no form."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadInput("Send the files as multipart/form-data, as the form on this page does.")
        callbacks = {name: getattr(self, f"_{name}") for name in _EVENTS}
        parser = MultipartParser(options[b"boundary"], cast(Any, callbacks))
        try:
            await _feed(parser, request.stream())
        except MultipartParseError as error:
            raise BadInput(f"The upload cannot be read: {error}. Send it again.") from None
        finally:
            self._close()

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" in options:
            self._begin_file(options[b"filename"].decode("utf-8", "replace"))
            return
        self._n_fields += 1
        if self._n_fields > _MAX_FIELDS:
            raise BadInput(f"More than {_MAX_FIELDS} fields were sent.")
        self._field = options.get(b"name", b"").decode("utf-8", "replace")[:100]
        self._fields[self._field] = ""

    def _begin_file(self, sent: str) -> None:
        if not sent:  # a file field that nothing was chosen for
            return
        self._n_files += 1
        if self._n_files > self._max_files:
            raise BadInput(f"More than {self._max_files:,} files were sent; choose the folder of one {self._what}.")
        # A folder's files come with their path.
        *folders, name = re.split(r"[/\\]", sent)
        path = self._place(folders, name)
        self._out = path.open("wb") if path is not None else None

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field:
            self._fields[self._field] += data[start:end].decode("utf-8", "replace")
            if len(self._fields[self._field]) > _MAX_FIELD_BYTES:
                raise BadInput(f"{self._field} is longer than {_MAX_FIELD_BYTES:,} characters.")
            return
        self._n_bytes += end - start
        if self._n_bytes > self._max_bytes + SLACK_BYTES:
            raise too_large(self._what, self._max_bytes, self._setting)
        if self._out is not None:
            self._out.write(data[start:end])

    def _on_part_end(self) -> None:
        self._field = ""
        self._close()

    def _close(self) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None


_EVENTS = (
    "on_part_begin",
    "on_header_field",
    "on_header_value",
    "on_header_end",
    "on_headers_finished",
    "on_part_data",
    "on_part_end",
)


async def _feed(parser: MultipartParser, body: AsyncIterator[bytes]) -> None:
    waiting = bytearray()
    async for chunk in body:
        waiting += chunk
        if len(waiting) >= _WRITE_BYTES:
            await run_in_threadpool(parser.write, bytes(waiting))
            waiting.clear()
    await run_in_threadpool(parser.write, bytes(waiting))
    parser.finalize()


def too_large(what: str, max_bytes: int, setting: str) -> TooLarge:
    return TooLarge(f"The {what} takes more than the {max_bytes:,} bytes that {setting} allows; nothing was kept.")


@contextmanager
def full_in_words(home: Path) -> Generator[None]:
    """Turn a full disk into a sentence with the bytes that are free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise Full(
            f"The server's disk has no room for it ({error.strerror}): {shutil.disk_usage(home).free / 2**20:,.0f} MiB "
            "are free. Nothing was kept; send it again once there is room."
        ) from None


def closing(error: Exception) -> dict[str, str]:
    """Headers of a refusal: the rest of a body that is too large is not read, the connection ends with the answer."""
    return {"connection": "close"} if isinstance(error, TooLarge | Full) else {}


def wants_json(request: Request) -> bool:
    return request.headers.get("accept", "").startswith("application/json")
