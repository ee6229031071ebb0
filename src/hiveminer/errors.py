"""One tree of errors.

Three kinds of people read them: the operator at a terminal (`OperatorError`, one line
that says what to do), the caller on the network (`Refused`, an HTTP status and a
reason), and the validator that called a miner (`MinerError`). Everything else that goes
wrong in here is a bug, and an assertion or a traceback says so.
"""

from __future__ import annotations


class HiveminerError(Exception):
    """Whatever this package raises on purpose."""


class OperatorError(HiveminerError):
    """A mistake or a missing thing that the operator can put right.

    The message is one line: what is wrong, then what to do. `exit_code` is what the
    program ends with.
    """

    exit_code = 2


class NotRegistered(OperatorError):
    """The hotkey holds no uid on the subnet (never had one, or lost it)."""

    exit_code = 3


class NotYetRegistered(NotRegistered):
    """The hotkey holds no uid when the program starts."""

    exit_code = 2


class ChainError(HiveminerError):
    """The chain did not answer in time, or refused; the next attempt may go through.

    `refused` is the kind of refusal, such as RATE_LIMITED, or empty when no answer came.
    `may_stand` says that what was sent may have arrived all the same.
    """

    def __init__(self, message: str = "", *, refused: str = "", may_stand: bool = False):
        super().__init__(message)
        self.refused = refused
        self.may_stand = may_stand


class SwarmError(HiveminerError):
    """The swarm could not do what was asked: no peer, no state, no group."""


class TrainingError(HiveminerError):
    """The rows could not be trained on, for a reason the caller should read."""


class Refused(HiveminerError):
    """A request is turned down: `status` is the HTTP status, the message its reason."""

    def __init__(self, status: int, reason: str, *, retry_after_seconds: float | None = None):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


class MinerError(HiveminerError):
    """A call to a neuron failed, and the fault is that neuron's or the way's.

    `status` is its HTTP status, or None when no answer that can be trusted came;
    `retry_after_seconds` is when it asked to be called again, if it did.
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
