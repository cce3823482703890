"""How `headwise serve` ends: the budget of an orderly end, and signals before there is one."""

from __future__ import annotations

import signal

import pytest

from cluster.config import ServerConfig
from deploy import local
from deploy.args import AppArgs
from deploy.signals import Interrupted, stop_signals


def test_by_default_a_second_of_the_promised_five_is_left_to_kill() -> None:
    assert ServerConfig().drain_timeout_s + local._END_SECONDS <= 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_start_starts_nothing(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LocalApplication", None)
    args = AppArgs.model_validate({"model": "m"})
    before = signal.getsignal(number)
    with stop_signals() as stop:
        signal.raise_signal(number)
        application = local.local_application(args, print, stop)
        with pytest.raises(Interrupted, match=number.name) as caught:
            application.__enter__()

    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
