"""What a server takes at most, and what it answers to the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mrflow_sched._runtime.errors import MrFlowError

__all__ = ["Limits", "Refused"]


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Attributes:
        pixels: Of an image.
        queue: Jobs that wait.
        images: Of a request.
        seconds: That a job may run.
        keep: Seconds that an ended job and its images are kept.
        grace: Seconds that the running job has to end by itself when the server is stopped.
        body: Bytes of a request.
        arrival: Seconds in which a request must have arrived.
        jobs: Ended jobs that are kept.
        kept_bytes: Bytes of images that are kept; the newest job's are kept in any case.
        events: Events of a job that are kept.
        connections: At once.
    """

    pixels: int
    queue: int = 16
    images: int = 10
    seconds: float = 600.0
    keep: float = 3600.0
    grace: float = 10.0
    body: int = 256 * 1024
    arrival: float = 20.0
    jobs: int = 1000
    kept_bytes: int = 512 * 1024**2
    events: int = 256
    connections: int = 512


class Refused(MrFlowError):
    """A refusal, or a failure, as HTTP says it.

    Attributes:
        status: Of the answer.
        code: A word for programs: "queue_full", "too_large" ...
        param: The field that is to blame, or None.
        retry_after: Seconds after which the same request may be taken; None: it says nothing of that.
    """

    def __init__(
        self, status: int, code: str, sentence: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        """Refuse.

        Args:
            status: Of the answer.
            code: A word for programs.
            sentence: What is wrong and what to do.
            param: The field that is to blame, or None.
            retry_after: Seconds after which the same request may be taken, or None.
        """
        super().__init__(sentence)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def value(self) -> dict[str, Any]:
        """What a JSON answer holds under "error", as OpenAI's API has it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"message": str(self), "type": kind, "param": self.param, "code": self.code}
