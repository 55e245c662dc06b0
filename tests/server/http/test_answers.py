"""From threads to tasks: every answer arrives, and a group of them by one wake-up."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from everlong.server.http.answers import Answers


def test_a_group_is_one_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        answers, futures = Answers(), [Future[int]() for _ in range(50)]
        loop, woken = asyncio.get_running_loop(), list[Any]()
        tasks = [asyncio.ensure_future(answers.of(future, 5.0)) for future in futures]
        await asyncio.sleep(0)
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: woken.append(a) or call(*a))
        for number, future in enumerate(futures):
            future.set_result(number)
        assert await asyncio.gather(*tasks) == list(range(50))
        assert len(woken) == 1

    asyncio.run(main())


def test_none_is_lost_between_threads() -> None:
    async def main() -> None:
        answers = Answers()
        with ThreadPoolExecutor(8) as pool:
            for _ in range(40):
                futures = [pool.submit(lambda n: n, number) for number in range(50)]
                found = await asyncio.gather(*(answers.of(one, 10.0) for one in futures))
                assert found == list(range(50))

    asyncio.run(main())


def test_an_answer_that_was_there_before() -> None:
    async def main() -> None:
        future = Future[str]()
        future.set_result("there")
        assert await Answers().of(future, 1.0) == "there"
        failed = Future[str]()
        failed.set_exception(KeyError("wrong"))
        with pytest.raises(KeyError):
            await Answers().of(failed, 1.0)

    asyncio.run(main())


def test_what_nobody_waits_for_is_cancelled() -> None:
    async def main() -> None:
        answers, late, left = Answers(), Future[int](), Future[int]()
        with pytest.raises(TimeoutError):
            await answers.of(late, 0.01)
        assert late.cancelled()
        task = asyncio.ensure_future(answers.of(left, 5.0))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left.cancelled()
        # one that is in work already ends without anybody
        running = Future[int]()
        running.set_running_or_notify_cancel()
        with pytest.raises(TimeoutError):
            await answers.of(running, 0.01)
        thread = threading.Thread(target=running.set_result, args=[1])
        thread.start()
        thread.join()
        await asyncio.sleep(0.01)
        assert running.result() == 1

    asyncio.run(main())


def test_a_loop_that_has_closed_does_not_keep_another_from_its_answers() -> None:
    answers, late = Answers(), Future[int]()

    async def gives_up() -> None:
        late.set_running_or_notify_cancel()
        with pytest.raises(TimeoutError):
            await answers.of(late, 0.01)

    asyncio.run(gives_up())
    # its loop is gone
    late.set_result(1)

    async def asks() -> None:
        future = Future[str]()
        task = asyncio.ensure_future(answers.of(future, 5.0))
        await asyncio.sleep(0)
        thread = threading.Thread(target=future.set_result, args=["there"])
        thread.start()
        thread.join()
        assert await task == "there"

    asyncio.run(asks())
