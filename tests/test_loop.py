"""Event loops in threads: calls that cross threads, one wake-up for many, and threads that end with their users."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import pytest

from torchrl_chat._loop import LoopThread, Mailbox, shared_loop


async def double(value: int, seconds: float = 0.0) -> int:
    await asyncio.sleep(seconds)
    return 2 * value


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def thread(request):
    loop = LoopThread("test", quick=request.param)
    yield loop
    loop.close()


def test_many_coroutines_awaited_on_another_loop(thread):
    async def ask() -> list[int]:
        return await asyncio.gather(*(thread.start(double(i, 0.01 * (i % 3))) for i in range(300)))

    assert asyncio.run(ask()) == [2 * i for i in range(300)]


def test_an_exception_comes_back(thread):
    async def fail() -> None:
        raise KeyError("lost")

    async def ask() -> None:
        with pytest.raises(KeyError, match="lost"):
            await thread.start(fail())
        assert await thread.start(double(2)) == 4

    asyncio.run(ask())


def test_cancelling_reaches_the_other_thread(thread):
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def ask() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(thread.start(wait()), 0.1)

    asyncio.run(ask())
    assert ended.wait(5)


def test_a_caller_that_is_gone_harms_nobody(thread):
    """Its loop ends while its coroutine runs; others are served all the same."""

    async def leave() -> None:
        thread.start(double(1, 0.1))  # nobody waits for it
        await asyncio.sleep(0)

    async def ask() -> list[int]:
        return await asyncio.gather(*(thread.start(double(i, 0.15)) for i in range(20)))

    for _ in range(3):
        asyncio.run(leave())
        assert asyncio.run(ask()) == [2 * i for i in range(20)]


def test_loops_of_callers_are_not_kept(thread):
    async def leave() -> None:
        thread.start(double(1, 0.1))
        await asyncio.sleep(0)

    loops = []
    for _ in range(5):
        loop = asyncio.new_event_loop()
        loops.append(weakref.ref(loop))
        loop.run_until_complete(leave())
        loop.close()
        del loop
    time.sleep(0.3)  # the results come, and find nobody
    assert thread.run(double(1)) == 2
    gc.collect()
    assert [loop() for loop in loops] == [None] * 5


def test_what_a_closing_loop_never_began_fails(thread):
    async def ask() -> None:
        wanted = thread.start(double(1))  # the other loop is told of it once this one has time
        thread.close()
        with pytest.raises(RuntimeError, match="closed before it began"):
            await asyncio.wait_for(wanted, 5)

    asyncio.run(ask())


def test_callers_in_many_threads(thread):
    results: dict[int, list[int]] = {}

    def call(k: int) -> None:
        async def ask() -> list[int]:
            return [await thread.start(double(i)) for i in range(50)]

        results[k] = asyncio.run(ask())

    threads = [threading.Thread(target=call, args=(k,)) for k in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert results == {k: [2 * i for i in range(50)] for k in range(6)}


def test_the_mailbox_wakes_its_loop_once_for_many_calls():
    loop = asyncio.new_event_loop()
    wakes = 0

    class Counted(Mailbox):
        def _work(self) -> None:
            nonlocal wakes
            wakes += 1
            super()._work()

    box, seen = Counted(loop), []
    for i in range(100):
        box.post(seen.append, i)
    box.post(loop.stop)
    loop.run_forever()
    assert seen == list(range(100))
    assert wakes == 1
    box.post(seen.append, 100)  # it is told again once it has looked
    box.post(loop.stop)
    loop.run_forever()
    assert (seen[-1], wakes) == (100, 2)
    loop.close()
    for _ in range(2):  # not only the first time
        with pytest.raises(RuntimeError, match="closed"):
            box.post(seen.append, 101)


def test_a_call_that_raises_does_not_keep_those_behind_it(thread):
    seen = []
    done = threading.Event()
    thread.post(lambda: (_ for _ in ()).throw(KeyError("boom")))
    for i in range(3):
        thread.post(seen.append, i)
    thread.post(done.set)
    assert done.wait(5)
    assert seen == [0, 1, 2]


def test_a_shared_thread_ends_with_the_last_who_holds_it():
    first, second = shared_loop("test.shared"), shared_loop("test.shared")
    assert first is second
    assert shared_loop("test.other") is not first
    thread = first._thread
    del first
    gc.collect()
    assert thread.is_alive()
    assert second.run(double(3)) == 6
    del second
    thread.join(60)
    assert not thread.is_alive()
    again = shared_loop("test.shared")
    assert again.run(double(4)) == 8


def test_a_closed_loop_says_so(thread):
    other = LoopThread("closed")
    other.close()

    async def ask() -> None:
        await other.start(double(1))

    with pytest.raises(RuntimeError, match="has been closed"):
        asyncio.run(ask())
    with pytest.raises(RuntimeError):
        other.post(print)
