"""Cancelling and progress."""

import asyncio
import threading

import pytest

from sam4mllm_tool.concurrency import (
    CallCancelled,
    CallContext,
    call_context,
    call_each,
    check_cancelled,
    run_in_thread,
    stage,
)


def test_stages_are_reported_and_a_cancelled_call_stops_at_the_next():
    seen: list[str] = []
    with call_context(CallContext(on_stage=seen.append)) as context:
        stage("one")
        context.cancelled.set()
        with pytest.raises(CallCancelled):
            stage("two")
    stage("outside")
    assert seen == ["one"]


async def test_cancelling_the_task_stops_the_worker():
    started, stopped = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        try:
            for _ in range(1000):
                threading.Event().wait(0.005)
                stage("step")
        except CallCancelled:
            stopped.set()
            raise

    task = asyncio.create_task(run_in_thread(work))
    await asyncio.to_thread(started.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(stopped.wait, 5)


async def test_the_surrounding_listener_hears_the_worker():
    seen: list[str] = []
    with call_context(CallContext(on_stage=seen.append)):
        await run_in_thread(stage, "locate")
    assert seen == ["locate"]


def test_calls_side_by_side_are_part_of_the_current_call():
    meet = threading.Barrier(3)

    def work(item: int) -> int:
        meet.wait(10)
        check_cancelled()
        return item * 10

    assert call_each(work, [3, 1, 2], 3) == [30, 10, 20]
    assert call_each(work, [], 3) == []
    with call_context(CallContext()) as context, pytest.raises(CallCancelled):
        context.cancelled.set()
        call_each(work, [3, 1, 2], 3)


def test_of_calls_side_by_side_the_first_error_counts_and_ends_the_rest():
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            raise ValueError("zero")
        threading.Event().wait(0.2)

    with pytest.raises(ValueError, match="zero"):
        call_each(work, list(range(100)), 2)
    assert len(begun) < 10
