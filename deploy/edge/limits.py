"""How much each caller may ask for: requests at a time, requests and tokens a minute, priority.

A limits file is YAML::

    default: {concurrent_requests: 8, requests_per_minute: 60, tokens_per_minute: 20000}
    callers:
      alice: {tokens_per_minute: 200000, max_priority: 10}

A caller's own entry wins over the default field by field; null lifts a limit. Callers are named by
their token or certificate; those without a name share what is left to their address.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated

import structlog
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import InvalidRequest, Overloaded, StartupError, Unavailable
from cluster.jobs import sequences_of
from cluster.request import Request
from cluster.text import TextDelta
from deploy.edge.answers import Caller
from deploy.edge.errors import Forbidden, LimitExceeded
from deploy.edge.files import CHECK_SECONDS, Reloaded, read_file

# Reserved for each sample of a request that does not say how many tokens it may have.
_UNSTATED_TOKENS = 1024
_CONCURRENCY_RETRY_SECONDS = 1.0
_MOST_CALLERS = 10_000
_ROUNDING = 1e-6  # tokens or requests that are none
# What ends a request without a token on the server's account: its prompt is not charged.
_REFUSALS = (Forbidden, InvalidRequest, LimitExceeded, Overloaded, Unavailable)
# A site has a whole /64 of addresses for itself.
_IPV6_PREFIX = 64

log = structlog.get_logger(__name__)

# Strict: to YAML, `yes` is true, which would be 1.
_Limit = Annotated[int, Field(ge=1, strict=True)] | None


class Limits(BaseModel):
    """Of one caller; None is no limit. `tokens_per_minute` counts prompts and what is generated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrent_requests: _Limit = None
    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    max_priority: Annotated[int, Field(strict=True)] | None = None


class LimitsFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    default: Limits = Limits()
    callers: dict[str, Limits] = {}

    def of(self, name: str) -> Limits:
        own = self.callers.get(name)
        if own is None:
            return self.default
        return self.default.model_copy(update=own.model_dump(exclude_unset=True))


def read_limits(path: str) -> LimitsFile:
    """Raises `StartupError` naming every fault."""
    try:
        content = yaml.safe_load(read_file("limits_file", path))
        return LimitsFile.model_validate(content or {})
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        )
        raise StartupError(f"limits_file {path}: {faults}") from error
    # ValueError: a date that is none; RecursionError: lists in lists without end.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())
        raise StartupError(f"limits_file {path} is not YAML: {cause}") from error


class CallerLimits:
    """A `deploy.edge.answers.Watcher` that refuses what is beyond a caller's limits.

    Raises `LimitExceeded` or `Forbidden`. A request reserves its prompt and what it may generate;
    at its end it is charged what it really took. One that asks for more than a minute's tokens is
    taken when the caller owes nothing, and what it takes beyond them is owed.
    """

    def __init__(
        self,
        path: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        check_every_s: float = CHECK_SECONDS,
    ) -> None:
        """Raises `StartupError` where the file is at fault."""
        self._file = Reloaded([path], lambda: read_limits(path), check_every_s=check_every_s)
        self._clock = clock
        self._accounts: OrderedDict[tuple[str, str], _Account] = OrderedDict()

    def begin(self, model: str, request: Request, caller: Caller) -> _Charge:
        limits = self._file.current.of(caller.name)
        name = caller.name or _network(caller.address)
        if limits.max_priority is not None and request.priority > limits.max_priority:
            raise Forbidden(
                f"priority {request.priority}: {name} may ask for at most {limits.max_priority}"
            )
        account = self._account(caller)
        try:
            return account.begin(request, name, limits, self._clock())
        except LimitExceeded as error:
            log.info("limit exceeded", caller=name, limit=error.metric, value=error.limit)
            raise

    def room(self, caller: Caller) -> int | None:
        """How many more requests the caller may run now; None for as many as it likes."""
        most = self._file.current.of(caller.name).concurrent_requests
        return None if most is None else max(0, most - self._account(caller).running)

    def _account(self, caller: Caller) -> _Account:
        key = ("name", caller.name) if caller.name else ("address", _network(caller.address))
        account = self._accounts.get(key)
        if account is None:
            self._forget()
            account = self._accounts[key] = _Account(self._clock)
        self._accounts.move_to_end(key)
        return account

    def _forget(self) -> None:
        """Whoever is longest away, so that strangers cannot fill the memory with addresses. Not
        those whose requests run, of which there are as many as requests at most."""
        if len(self._accounts) < _MOST_CALLERS:
            return
        idle = (key for key, account in self._accounts.items() if not account.running)
        longest_away = next(idle, None)
        if longest_away is not None:
            del self._accounts[longest_away]


class _Account:
    """What one caller has going and has used."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.running = 0
        self.requests = _Used()
        self.tokens = _Used()

    def begin(self, request: Request, name: str, limits: Limits, now: float) -> _Charge:
        """Everything is checked before anything is charged."""
        most = limits.concurrent_requests
        if most is not None and self.running >= most:
            raise _exceeded(name, "concurrent_requests", most, _CONCURRENCY_RETRY_SECONDS)
        reserved = _reservation(request, limits.tokens_per_minute)
        for used, metric, limit, need in (
            (self.requests, "requests_per_minute", limits.requests_per_minute, 1),
            (self.tokens, "tokens_per_minute", limits.tokens_per_minute, reserved),
        ):
            wait = used.wait(need, limit, now)
            if limit is not None and wait > 0:
                raise _exceeded(name, metric, limit, wait)
        self.running += 1
        self.requests.add(1, limits.requests_per_minute, now)
        self.tokens.add(reserved, limits.tokens_per_minute, now)
        return _Charge(self, len(request.prompt) + len(request.generated), reserved, limits)


class _Charge:
    """A `deploy.edge.answers.Watch` that keeps an account true."""

    def __init__(self, account: _Account, prompt: int, reserved: int, limits: Limits) -> None:
        self._account = account
        self._prompt = prompt
        self._generated = 0
        self._charged = reserved
        self._limit = limits.tokens_per_minute

    def delta(self, delta: TextDelta) -> None:
        self._generated += len(delta.tokens)
        if self._prompt + self._generated > self._charged:
            self._settle(self._prompt + self._generated)

    def end(self, error: BaseException | None) -> None:
        self._account.running -= 1
        refused = isinstance(error, _REFUSALS) and not self._generated
        self._settle(0 if refused else self._prompt + self._generated)

    def _settle(self, tokens: int) -> None:
        account = self._account
        account.tokens.add(tokens - self._charged, self._limit, account.clock())
        self._charged = tokens


class _Used:
    """A leaky bucket: what was used runs out of it at the limit's pace."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._at = 0.0

    def wait(self, need: int, limit: int | None, now: float) -> float:
        """Seconds until `need` has room below the limit a minute; 0 if it has."""
        if limit is None:
            return 0
        self._leak(limit, now)
        over = self._amount + min(need, limit) - limit
        return over * 60 / limit if over > _ROUNDING else 0

    def add(self, amount: int, limit: int | None, now: float) -> None:
        """Use more, or give back where negative."""
        if limit is not None:
            self._leak(limit, now)
            self._amount = max(0.0, self._amount + amount)

    def _leak(self, limit: int, now: float) -> None:
        self._amount = max(0.0, self._amount - (now - self._at) * limit / 60)
        self._at = now


def _reservation(request: Request, limit: int | None) -> int:
    stated = request.stopping.max_tokens
    sample = _UNSTATED_TOKENS if stated is None else max(0, stated - len(request.generated))
    whole = len(request.prompt) + len(request.generated) + sequences_of(request) * sample
    return whole if limit is None else min(whole, limit)


def _exceeded(name: str, metric: str, limit: int, retry_after: float) -> LimitExceeded:
    return LimitExceeded(
        f"{metric}={limit} of {name} is used up: try again in {retry_after:.1f} s",
        caller=name,
        metric=metric,
        limit=limit,
        retry_after=retry_after,
    )


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address or "local"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
    return str(parsed)
