"""Where the ranks of a process group meet: a key-value store that the driver hosts.

Each epoch has its own prefix, so that a late message of an older epoch meets nobody.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from shards.errors import CollectiveError

ABORTED = "aborted"
TIMED_OUT = "timed out"
LOST = "lost a connection"

_ROLL_CALL_S = 0.5

T = TypeVar("T")


def host_store(host: str = "127.0.0.1") -> tuple[TCPStore, str]:
    """The driver's store, and its "host:port" for the ranks; it serves for as long as it is held.

    It listens on `host` alone, at any free port. Raises `CollectiveError` where that is not an
    address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind(address)
            listener.listen(1024)
            port = listener.getsockname()[1]
            fd = listener.detach()  # the store closes it
    except OSError as error:
        raise CollectiveError(f"the store cannot listen on {host!r}: {error.strerror}") from error
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
    return store, f"{host}:{port}"


def abort_epoch(store: TCPStore, epoch: int) -> None:
    """End the group of an epoch from the driver's side, unless it has ended already: ranks that
    wait in it raise `CollectiveAborted`."""
    _try(lambda: PrefixStore(_prefix(epoch), store).compare_set("ended", "", ABORTED))


def split_address(rendezvous: str) -> tuple[str, int]:
    host, colon, port = rendezvous.rpartition(":")
    if not (colon and host and port.isdecimal()):
        raise CollectiveError(f'rendezvous={rendezvous!r}: give the "host:port" of host_store()')
    return host.strip("[]"), int(port)


def local_address(rendezvous: str) -> str:
    """The address of this host from which the store is reached: loopback where that is loopback."""
    host, port = split_address(rendezvous)
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


class Meeting:
    """One rank's view of an epoch in the driver's store.

    A process group's transport can say neither that the group has been given up nor which rank is
    missing. Nothing here is touched while calls succeed: only a rank that has waited for long asks
    `ended`, and one that fails holds a roll call.

    Raises `CollectiveError` where the store is not reached within the deadline.
    """

    def __init__(
        self, rendezvous: str, epoch: int, rank: int, world: int, deadline_s: float
    ) -> None:
        host, port = split_address(rendezvous)
        try:
            store = TCPStore(
                host,
                port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=deadline_s),
            )
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {rank} cannot reach the driver's store at {rendezvous}: {error}"
            ) from error
        self.store = PrefixStore(_prefix(epoch), store)
        self._rank = rank
        self._world = world

    def join(self) -> None:
        self.store.set(f"joined/{self._rank}", "")

    def not_joined(self) -> list[int]:
        """The ranks that never called `join`."""
        return self._await_ranks("joined", 0)

    def end(self, why: str) -> None:
        """Tell every rank that waits; the first to say why is the one that is heard."""
        _try(lambda: self.store.compare_set("ended", "", why))

    def ended(self) -> str | None:
        """Why the epoch has ended; None while it lives, or when the driver is gone."""
        if self._is_set("ended"):
            return _try(lambda: str(self.store.get("ended").decode()))
        return None

    def roll_call(self, calls: int) -> list[int]:
        """After `end`: the ranks behind this one, which has begun `calls` calls.

        A dead or stopped rank does not answer, nor does one that computes; those that wait in the
        group answer within `_ROLL_CALL_S`. Empty where all have come as far.
        """
        _try(lambda: self.store.set(f"calls/{self._rank}", str(calls)))
        absent = self._await_ranks("calls", _ROLL_CALL_S)
        if absent:
            return absent
        answers = _try(
            lambda: self.store.multi_get([f"calls/{rank}" for rank in range(self._world)])
        )
        return [rank for rank, count in enumerate(answers or []) if int(count) < calls]

    def _is_set(self, key: str) -> bool | None:
        return _try(lambda: bool(self.store.check([key])))

    def _await_ranks(self, key: str, patience_s: float) -> list[int]:
        expiry = time.monotonic() + patience_s
        while True:
            absent = [rank for rank in range(self._world) if self._is_set(f"{key}/{rank}") is False]
            if not absent or time.monotonic() >= expiry:
                return absent
            time.sleep(0.01)


def _prefix(epoch: int) -> str:
    return f"epoch{epoch}"


def _try(ask: Callable[[], T]) -> T | None:
    """The store dies with the driver; what failed before that is what the caller must hear."""
    try:
        return ask()
    except RuntimeError:
        return None
