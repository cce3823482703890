"""What is noted of one request while it runs."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

OK = "OK"
INTERRUPTED = "INTERRUPTED"


@dataclass(slots=True)
class Record:
    """Times are seconds since the start of the run.

    `due` is when the request was to be sent, `sent` when it was, `ended` when it was over.
    `arrivals` has the time of each message that brought tokens. `status` is OK, the name of a gRPC
    status, or INTERRUPTED for what this side gave up; `message` says more where there is more.
    """

    index: int
    due: float
    sent: float
    ended: float
    status: str = INTERRUPTED
    message: str = ""
    arrivals: array[float] = field(default_factory=lambda: array("d"))
    first_tokens: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def arrived(self, now: float, tokens: int) -> None:
        """A message with `tokens` tokens is here."""
        if tokens:
            self.arrivals.append(now)
            self.tokens += tokens
            self.first_tokens = self.first_tokens or tokens

    @property
    def ttft(self) -> float | None:
        """Seconds from when the request was due to its first token; None if there was none."""
        return self.arrivals[0] - self.due if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first message; None if nothing came after it."""
        rest = self.tokens - self.first_tokens
        return (self.arrivals[-1] - self.arrivals[0]) / rest if rest else None

    @property
    def e2e(self) -> float:
        """Seconds from when the request was due to its end."""
        return self.ended - self.due
