"""Errors of requests, without HTTP: `gateway/errors.py` says with which status each is sent."""

from core.errors import SpotforgeError


class RequestError(SpotforgeError):
    """A request is not answered.

    Args:
        message: Reason in one line, for people.
        param: Field of the request that is wrong.
        code: Reason for programs.
        retry_after_s: Whole seconds after which a retry makes sense; None: it never does.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.retry_after_s = param, code, retry_after_s


class InvalidRequest(RequestError):
    """A request breaks a rule, and would again."""


class Unauthorized(RequestError):
    """A request has no valid key."""


class Forbidden(RequestError):
    """The key of a request does not allow it."""


class NotFound(RequestError):
    """An object that a request names does not exist, or belongs to another key."""


class Conflict(RequestError):
    """The state of an object does not allow what a request asks for."""


class LimitReached(RequestError):
    """A limit is reached: the request may be sent again later."""


class RequestFailed(RequestError):
    """An engine failed at a request and would fail again."""


class Unavailable(RequestError):
    """The engine or the server is not available now."""


class DeadlinePassed(RequestError):
    """The deadline of a request has passed."""
