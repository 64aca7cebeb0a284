"""Errors of the API, in Google's shape (AIP-193)."""

from __future__ import annotations

from typing import Any, Final

#: Statuses and their HTTP codes (google.rpc.Code).
_CODES: Final = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "UNIMPLEMENTED": 501,
}
_NUMBERS: Final = {
    "INVALID_ARGUMENT": 3,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "UNIMPLEMENTED": 12,
}


class ApiError(Exception):
    """A refusal of the API.

    Args:
        status: The name of a google.rpc.Code.
        message: For people.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code: int = _CODES[status]

    def document(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {"error": {"code": self.code, "message": str(self), "status": self.status}}

    def rpc_status(self) -> dict[str, Any]:
        """Return the ``google.rpc.Status`` of one request of a batch."""
        return rpc_status(self.status, str(self))


def rpc_status(status: str, message: str) -> dict[str, Any]:
    """Return a ``google.rpc.Status``."""
    return {"code": _NUMBERS[status], "message": message}


def invalid(message: str) -> ApiError:
    """Return the error of a request that is wrong whatever the state is."""
    return ApiError("INVALID_ARGUMENT", message)
