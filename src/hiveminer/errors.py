"""All exceptions: `OperatorError` for the operator (one line with the remedy), `Refused` for a
caller on the network (an HTTP status and a reason), `MinerError` for whoever called a miner.
Anything else is a bug, and ends in an assertion or a traceback."""

from __future__ import annotations


class HiveminerError(Exception):
    """Base class of all exceptions that this package raises on purpose."""


class OperatorError(HiveminerError):
    """Something that the operator can fix. The message is one line: what is wrong, then what to
    do. `exit_code` is the program's."""

    exit_code = 2


class NotRegistered(OperatorError):
    """The hotkey holds no uid on the subnet (never had one, or lost it)."""

    exit_code = 3


class NotYetRegistered(NotRegistered):
    """The hotkey holds no uid when the program starts."""

    exit_code = 2


class ChainError(HiveminerError):
    """The chain did not answer in time, or refused; the next attempt may succeed.

    refused: the kind of refusal, such as RATE_LIMITED; empty without an answer.
    may_stand: whether what was sent may have been included all the same.
    """

    def __init__(self, message: str = "", *, refused: str = "", may_stand: bool = False):
        super().__init__(message)
        self.refused = refused
        self.may_stand = may_stand


class SwarmError(HiveminerError):
    """The swarm could not do what was asked: no peer, no state, no group."""


class TrainingError(HiveminerError):
    """The rows cannot be trained; the reason is for the caller."""


class Refused(HiveminerError):
    """A request is refused with this HTTP status and reason; `kind` is its name in the counts."""

    def __init__(
        self,
        status: int,
        reason: str,
        *,
        kind: str | None = None,
        retry_after_seconds: float | None = None,
    ):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.kind = kind or f"refused_{status}"
        self.retry_after_seconds = retry_after_seconds


class MinerError(HiveminerError):
    """A call failed for a reason caused by the remote neuron or the network.

    status: its HTTP status; None without an answer that can be trusted.
    retry_after_seconds: when it asked to be called again.
    """

    def __init__(
        self,
        hotkey: str,
        reason: str,
        *,
        status: int | None = None,
        retry_after_seconds: float | None = None,
    ):
        super().__init__(f"{hotkey[:8]}: {reason}")
        self.hotkey = hotkey
        self.reason = reason
        self.status = status
        self.retry_after_seconds = retry_after_seconds


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next after a colon; or its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]


def printable(text: object) -> str:
    """A text with line ends, escape sequences and whatever else is not printed escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )


def one_line(said: object) -> str:
    """An error or a text as one printable line; an error without a message as its type."""
    return printable(" ".join(str(said).split())) or type(said).__name__
