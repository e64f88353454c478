"""Signals: what runs is cancelled once and cleans up in peace, however often they come."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import anyio
import pytest

from ramet.agents import drain
from ramet.errors import PolicyError


@pytest.fixture(autouse=True)
def handled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(drain, "_signal", None)
    lines: list[str] = []
    drain.handle_signals(lambda: lines.append("last words"))
    yield lines
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels_what_runs_and_further_ones_do_not_disturb_its_end(number, status):
    ended = []

    async def work() -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep_forever)
                signal.raise_signal(number)
                signal.raise_signal(number)
                await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                for _ in range(3):
                    signal.raise_signal(signal.SIGINT)
                    await anyio.sleep(0)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        drain.run(work)
    assert ended == [True] and drain.status() == status


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_elsewhere_it_is_raised_once(number, status):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    signal.raise_signal(number)
    assert drain.status() == status


def test_errors_and_results_pass_through():
    async def fails(error: Exception) -> None:
        raise error

    async def gives(value: int) -> int:
        return value

    with pytest.raises(PolicyError, match="no"):
        drain.run(fails, PolicyError("no"))
    assert drain.run(gives, 3) == 3 and drain.status() is None


def test_what_does_not_end_is_ended_by_a_later_signal(monkeypatch, handled):
    class Exited(BaseException):
        pass

    def leave(status: int) -> None:
        handled.append(f"status {status}")
        raise Exited

    monkeypatch.setattr(drain.os, "_exit", leave)
    monkeypatch.setattr(drain, "PATIENCE", -1.0)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Exited):
        signal.raise_signal(signal.SIGINT)
    assert handled == ["last words", "status 143"]


def test_a_sigint_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    drain.handle_signals(bool)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_first_sigterm_drains_and_the_second_interrupts():
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt), drain.draining(lines.append):
        assert not drain.requested()
        signal.raise_signal(signal.SIGTERM)
        assert drain.requested() and len(lines) == 1
        signal.raise_signal(signal.SIGTERM)
    assert drain.status() == 143 and not drain.requested()
