"""Every error SAE Atlas raises on purpose.

    AtlasError                 a sentence for the person, and an HTTP status
    |- NotFound        404     no such model, source, feature, job
    |- BadInput        422     a value that cannot be used; names it, with both numbers
    |- BadFile         422     an SAE, model, corpus or bundle file that is refused
    |- Unauthorized    401     nobody is signed in, or the key is unknown, expired or revoked
    |- Forbidden       403     cross-site or not allowed
    |- Conflict        409     exists already with other content
    |- TooLarge        413     over a byte or quota limit
    |- Busy            429     a bounded queue is full; retry_after seconds
    |- Full            507     the disk
    |- Unavailable     503     the gpu worker or the database cannot answer now; retry_after seconds

Raised where the problem is noticed; turned into a page, a partial or JSON in app.web.problems, into an exit
code in app.cli.
"""

from __future__ import annotations


class AtlasError(Exception):
    """A failure with a message that says what to do."""

    status: int = 500
    retry_after: int | None = None

    @property
    def message(self) -> str:
        return str(self)


class NotFound(AtlasError):
    status = 404


class BadInput(AtlasError):
    status = 422


class BadFile(AtlasError):
    status = 422


class Unauthorized(AtlasError):
    status = 401


class Forbidden(AtlasError):
    status = 403


class Conflict(AtlasError):
    status = 409


class TooLarge(AtlasError):
    status = 413


class Full(AtlasError):
    status = 507


class Busy(AtlasError):
    status = 429

    def __init__(self, message: str, retry_after: int = 2) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(AtlasError):
    status = 503

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


BY_STATUS: dict[int, type[AtlasError]] = {
    cls.status: cls for cls in (NotFound, BadInput, Forbidden, Conflict, TooLarge, Busy, Unavailable)
}
"""How the worker's client turns a reply's status back into the error the worker raised."""
