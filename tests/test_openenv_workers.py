"""Threads beside a server's event loop: what a call that never returns may cost."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from torchrl_chat.openenv.server.workers import Late, Workers

pytestmark = pytest.mark.services


def test_results_and_errors_come_back():
    async def run() -> None:
        workers = Workers(2)
        assert await asyncio.gather(*(workers.run(lambda i=i: 2 * i) for i in range(20))) == [
            2 * i for i in range(20)
        ]
        for error, seen in (
            (KeyError("a"), KeyError),
            (SystemExit(3), RuntimeError),
            (StopIteration(), RuntimeError),
        ):

            def fail(error=error):
                raise error

            with pytest.raises(seen):
                await workers.run(fail)
        workers.close()

    asyncio.run(run())


def test_no_more_at_a_time_than_there_are_places():
    now, most, lock = [0], [0], threading.Lock()

    def work() -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1

    async def run() -> None:
        workers = Workers(3)
        await asyncio.gather(*(workers.run(work) for _ in range(20)))

    asyncio.run(run())
    assert most == [3]


def test_a_late_call_gives_its_place_away_and_is_told_of_at_its_end():
    async def run() -> None:
        workers, gate = Workers(1), threading.Event()
        with pytest.raises(Late, match="longer than 0.05 s") as late:
            await workers.run(gate.wait, 0.05)
        assert workers.stuck == 1
        assert await workers.run(lambda: "next", 5) == "next"
        gate.set()
        assert await asyncio.wait_for(late.value.rest, 5) is True
        await asyncio.sleep(0)
        assert workers.stuck == 0

    asyncio.run(run())


def test_waiting_for_a_place_counts_too_and_too_many_late_calls_are_refused():
    async def run() -> None:
        workers, gate = Workers(1, max_stuck=2), threading.Event()
        first = asyncio.create_task(workers.run(gate.wait, 0.4))
        await asyncio.sleep(0.05)
        with pytest.raises(TimeoutError, match="all workers were busy for 0.1 s"):
            await workers.run(lambda: None, 0.1)
        with pytest.raises(Late):
            await first
        with pytest.raises(Late):
            await workers.run(gate.wait, 0.05)
        with pytest.raises(RuntimeError, match="2 earlier calls"):
            await workers.run(lambda: None)
        gate.set()
        while workers.stuck:
            await asyncio.sleep(0.01)
        assert await workers.run(lambda: 3) == 3

    asyncio.run(run())


def test_a_call_that_outlives_its_loop_says_nothing(caplog, capfd):
    async def run() -> None:
        with pytest.raises(Late):
            await Workers(1).run(lambda: time.sleep(0.3), 0.05)

    asyncio.run(run())
    time.sleep(0.5)
    assert not caplog.records
    assert capfd.readouterr().err == ""
