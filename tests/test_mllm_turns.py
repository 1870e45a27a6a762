"""Who reads next: order, sharing, and what happens to others when one call ends badly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sam4mllm_tool.concurrency import CallCancelled, CallContext, call_context
from sam4mllm_tool.mllm.turns import Turns


class Machine:
    """Runs reads, which are texts such as ``a1``; those in capital letters share no pass."""

    def __init__(self, room: int = 100, seconds: float = 0.0) -> None:
        self.passes: list[list[str]] = []
        self.room, self.seconds = room, seconds
        self.gate = threading.Event()
        self.gate.set()
        self.turns: Turns[str, str] = Turns(self.run, self.shares)

    def run(self, reads: Sequence[str]) -> list[str | Exception | None]:
        self.gate.wait(10)
        time.sleep(self.seconds)
        now = list(reads[: self.room])
        self.passes.append(now)
        if "!break" in now[0]:
            raise KeyboardInterrupt
        done = [ValueError(read) if "!wrong" in read else read + " read" for read in now]
        return [*done, *[None] * (len(reads) - len(now))]

    def shares(self, read: str) -> bool:
        return read[0].islower()

    def waiting(self, callers: int) -> None:
        """Wait until so many callers are in the queue."""
        end = time.monotonic() + 10
        while len(self.turns._queue) < callers:
            assert time.monotonic() < end
            time.sleep(0.001)


def in_order(machine: Machine, *callers: Callable[[], Any]) -> None:
    """Start each call once those before it wait; the first one is held up in its pass till then."""
    machine.gate.clear()
    threads = [threading.Thread(target=call) for call in callers]
    for number, thread in enumerate(threads, 1):
        thread.start()
        machine.waiting(number)
    machine.gate.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def taking(machine: Machine, *reads: str, into: list[Any] | None = None) -> Callable[[], None]:
    def take() -> None:
        try:
            found: Any = machine.turns.take(reads)
        except BaseException as error:
            found = error
        if into is not None:
            into.append(found)

    return take


def test_reads_share_a_turn_and_others_keep_their_place() -> None:
    machine, found = Machine(), []
    names = ("a1", "B1", "a2", "C1", "a3", "C2")
    in_order(machine, *(taking(machine, name, into=found) for name in names))
    assert machine.passes == [["a1"], ["B1"], ["a2", "a3"], ["C1"], ["C2"]]
    assert sorted(found) == sorted([name + " read"] for name in names)


def test_outcomes_come_in_the_order_of_the_reads() -> None:
    machine = Machine(room=2)
    reads = ["a1", "B1", "a2", "a3", "B2", "a4"]
    assert machine.turns.take(reads) == [read + " read" for read in reads]
    assert machine.passes == [["a1", "a2"], ["B1"], ["a3", "a4"], ["B2"]]
    assert machine.turns.take([]) == []


def test_thirty_reads_do_not_starve_one() -> None:
    """Alone or in passes that are full: whoever asks for one read waits for one turn of others."""
    for letter, room in (("A", 1), ("a", 4)):
        machine = Machine(room)
        many = [f"{letter}{n}" for n in range(30)]
        in_order(machine, taking(machine, "Z"), taking(machine, *many), taking(machine, "a-one"))
        first = next(n for n, some in enumerate(machine.passes) if "a-one" in some)
        assert first <= 2
        assert sum(map(len, machine.passes)) == 32


def test_in_a_full_pass_every_callers_first_comes_before_anybodys_second() -> None:
    machine = Machine(room=3)
    in_order(
        machine,
        taking(machine, "Z"),
        taking(machine, "a1", "a2", "a3", "a4"),
        taking(machine, "a-one"),
    )
    assert machine.passes == [["Z"], ["a1", "a-one", "a2"], ["a3", "a4"]]


def test_an_error_of_one_read_is_its_callers() -> None:
    machine, found = Machine(), []
    in_order(
        machine, taking(machine, "Z"), taking(machine, "a1", into=found),
        taking(machine, "a2", "a!wrong", into=found), taking(machine, "a3", into=found),
    )  # fmt: skip
    assert machine.passes[1:] == [["a1", "a2", "a3", "a!wrong"]]
    failed = [one for one in found if isinstance(one, ValueError)]
    assert len(found) == 3 and len(failed) == 1
    assert ["a1 read"] in found and ["a3 read"] in found


def test_a_pass_that_breaks_off_is_run_again_for_the_others() -> None:
    machine, found, broken = Machine(), [], []
    in_order(
        machine, taking(machine, "Z"), taking(machine, "a!break", into=broken),
        taking(machine, "a1", into=found), taking(machine, "a2", into=found),
    )  # fmt: skip
    assert isinstance(broken[0], KeyboardInterrupt)
    assert machine.passes[1:] == [["a!break", "a1", "a2"], ["a1", "a2"]]
    assert sorted(found) == [["a1 read"], ["a2 read"]]
    assert machine.turns.take(["a3"]) == ["a3 read"]


def test_a_cancelled_caller_leaves_the_queue() -> None:
    machine, found, gone = Machine(), [], CallContext()

    def leaves(*reads: str) -> Callable[[], None]:
        def take() -> None:
            with call_context(gone), pytest.raises(CallCancelled):
                machine.turns.take(reads)
            found.append("left")

        return take

    def cancels() -> None:
        gone.cancelled.set()
        machine.turns.take(["a9"])

    in_order(
        machine, taking(machine, "Z"), leaves("a1", "a2"), taking(machine, "a3", into=found),
        leaves("B1"), cancels,
    )  # fmt: skip
    assert machine.passes == [["Z"], ["a3", "a9"]]
    assert found.count("left") == 2 and ["a3 read"] in found
    with call_context(gone), pytest.raises(CallCancelled):
        machine.turns.take(["a4"])


def test_callers_in_step_share_every_turn() -> None:
    """Whoever comes back first from a shared pass waits for the others, not longer than a pass."""
    machine = Machine(seconds=0.05)
    start = threading.Barrier(4)

    def talk(name: str) -> None:
        with machine.turns.under_way():
            start.wait(10)
            for word in range(5):
                machine.turns.take([f"a{name}{word}"])

    threads = [threading.Thread(target=talk, args=(name,)) for name in "wxyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sum(map(len, machine.passes)) == 20
    assert len(machine.passes) <= 8


def test_nobody_waits_for_ever_for_one_who_does_not_come() -> None:
    machine = Machine(seconds=0.01)
    with machine.turns.under_way(), machine.turns.under_way():
        assert machine.turns.take(["a1"]) == ["a1 read"]
        assert machine.turns.take(["a2"]) == ["a2 read"]
    assert machine.turns._under_way == 0


def test_nobody_waits_for_one_who_is_there_with_a_read_that_shares_no_pass() -> None:
    machine = Machine()
    machine.turns._last_seconds = 1000.0
    with machine.turns.under_way(), machine.turns.under_way():
        in_order(machine, taking(machine, "a1"), taking(machine, "B1"))
    assert machine.passes == [["a1"], ["B1"]]
