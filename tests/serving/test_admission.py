"""Admission: nothing leaks, nobody is shut out, and what does not fit is refused at once.

The event loop of these tests jumps to its next timer, so that minutes pass in no time.
"""

import asyncio
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from serving.admission import (
    Admission,
    DeadlineExpired,
    KeyLimits,
    Limits,
    Priority,
    Rejected,
)


class JumpingLoop(asyncio.SelectorEventLoop):
    """A loop whose time is that of its next timer."""

    def __init__(self):
        super().__init__()
        self.now_s = 1_000.0
        select = self._selector.select

        def jump(timeout):
            if timeout is None:
                raise RuntimeError("everything waits for ever")
            self.now_s += timeout
            return select(0)

        self._selector.select = jump

    def time(self):
        return self.now_s


def simulate(scenario, **limits):
    """Runs `scenario(admission, loop)` on a loop that jumps."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        loop = runner.get_loop()
        admission = Admission(Limits(**limits), loop.time)
        return runner.run(scenario(admission, loop))


async def hold(admission, key, seconds, started=None, **request):
    async with await admission.acquire(key, 10, 10, **request):
        if started is not None:
            started.append(key)
        await asyncio.sleep(seconds)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def refusal(admission, key="a", prompt_tokens=10, max_tokens=10, **request):
    """What a request is refused with, without having waited."""
    before_s = asyncio.get_running_loop().time()
    with pytest.raises(Rejected) as caught:
        await admission.acquire(key, prompt_tokens, max_tokens, **request)
    assert asyncio.get_running_loop().time() == before_s
    return caught.value


def test_a_free_slot_is_given_without_waiting_and_the_next_waits_for_it():
    async def scenario(admission, loop):
        slot = await admission.acquire("a", 10, 10)
        waiting = asyncio.create_task(admission.acquire("a", 7, 10))
        await settle()
        assert (admission.running, admission.waiting, admission.waiting_tokens) == (1, 1, 7)
        slot.release(12)
        slot.release(12)  # must not free the slot of the next one
        await waiting
        assert (admission.running, admission.waiting, admission.waiting_tokens) == (1, 0, 0)

    simulate(scenario, max_running=1)


def test_the_queue_is_a_quarter_of_what_runs_and_follows_its_size():
    async def scenario(admission, loop):
        tasks = [asyncio.create_task(hold(admission, "a", 1)) for _ in range(10)]
        await settle()
        assert (admission.running, admission.waiting) == (8, 2)
        rejected = await refusal(admission)
        assert (rejected.reason, rejected.retry_after_s) == ("queue_full", 1)
        admission.resize(12)  # all that waited run, and three may wait
        await settle()
        tasks += [asyncio.create_task(hold(admission, "a", 1)) for _ in range(5)]
        await settle()
        assert (admission.running, admission.waiting) == (12, 3)
        assert (await refusal(admission)).reason == "queue_full"
        await asyncio.gather(*tasks)
        assert admission.refused == {"queue_full": 2}
        assert admission.admitted == 15

    simulate(scenario, max_running=8)


def test_no_queue_at_all_is_possible():
    async def scenario(admission, loop):
        await admission.acquire("a", 10, 10)
        assert (await refusal(admission)).reason == "queue_full"

    simulate(scenario, max_running=1, max_queued_requests=0)


def test_prompt_tokens_that_wait_are_limited():
    async def scenario(admission, loop):
        await admission.acquire("a", 1_000, 1)
        waiting = asyncio.create_task(admission.acquire("a", 60, 1))
        await settle()
        assert (await refusal(admission, prompt_tokens=41)).reason == "queue_tokens"
        fits = asyncio.create_task(admission.acquire("a", 40, 1))
        await settle()
        assert admission.waiting_tokens == 100
        waiting.cancel()
        fits.cancel()

    simulate(scenario, max_running=1, max_queued_requests=9, max_queued_tokens=100)


def test_a_wait_longer_than_the_deadline_is_refused_at_once():
    async def scenario(admission, loop):
        await hold(admission, "a", 10)  # so a slot is held for 10 s
        tasks = [asyncio.create_task(hold(admission, "a", 10)) for _ in range(4)]
        await settle()
        rejected = await refusal(admission, deadline_s=12)  # the wait would be 3 * 10 / 2
        assert (rejected.reason, rejected.retry_after_s) == ("deadline", 3)
        tasks.append(asyncio.create_task(hold(admission, "a", 10, deadline_s=21)))
        await asyncio.gather(*tasks)  # where there is time enough it does run

    simulate(scenario, max_running=2, max_queued_requests=9)


def test_the_deadline_passes_in_the_queue():
    async def scenario(admission, loop):
        limits = KeyLimits(tokens_per_minute=100)
        slot = await admission.acquire("a", 10, 10)
        with pytest.raises(DeadlineExpired, match="5 s"):
            await admission.acquire("b", 90, 10, deadline_s=5, key_limits=limits)
        assert loop.time() == 1_005
        assert (admission.waiting, admission.refused) == (0, {"expired": 1})
        slot.release()
        (await admission.acquire("b", 90, 10, key_limits=limits)).release()  # it got them back

    simulate(scenario, max_running=1)


def test_a_cancelled_request_leaves_the_queue_at_once():
    async def scenario(admission, loop):
        slot = await admission.acquire("a", 10, 10)
        tasks = [asyncio.create_task(admission.acquire("a", 10, 10)) for _ in range(2)]
        await settle()
        tasks[0].cancel()
        slot.release()  # before the cancelled task has run again
        await tasks[1]
        assert (admission.running, admission.waiting) == (1, 0)
        assert tasks[0].cancelled()

    simulate(scenario, max_running=1, max_queued_requests=2)


def test_a_request_cancelled_as_its_turn_comes_gives_the_slot_back():
    async def scenario(admission, loop):
        slot = await admission.acquire("a", 10, 10)
        waiting = asyncio.create_task(admission.acquire("a", 10, 10))
        await settle()
        slot.release()
        assert admission.running == 1
        waiting.cancel()
        await settle()
        assert waiting.cancelled() and admission.running == 0

    simulate(scenario, max_running=1)


def test_a_small_key_is_served_between_the_hundred_requests_of_a_greedy_one():
    async def scenario(admission, loop):
        started = []
        tasks = [asyncio.create_task(hold(admission, "greedy", 1, started)) for _ in range(104)]
        await settle()
        assert (admission.running, admission.waiting) == (4, 100)
        tasks += [asyncio.create_task(hold(admission, "small", 1, started)) for _ in range(3)]
        await asyncio.gather(*tasks)
        assert started[4:10].count("small") == 3
        assert len(started) == 107

    simulate(scenario, max_running=4, max_queued_requests=103)


def test_a_full_queue_of_one_key_takes_one_request_of_another():
    async def scenario(admission, loop):
        tasks = [asyncio.create_task(hold(admission, "greedy", 1)) for _ in range(10)]
        await settle()
        assert (await refusal(admission, "greedy")).reason == "queue_full"
        for i in range(2):
            tasks.append(asyncio.create_task(hold(admission, f"small{i}", 1)))
            await settle()
        assert (await refusal(admission, "small0")).reason == "queue_full"
        assert (await refusal(admission, "other")).reason == "queue_full"  # twice the limit
        await asyncio.gather(*tasks)

    simulate(scenario, max_running=8, max_queued_requests=2)


def test_keys_that_wait_take_turns_and_a_key_keeps_its_order():
    async def scenario(admission, loop):
        slot, order = await admission.acquire("z", 10, 10), []

        async def run(key, number):
            async with await admission.acquire(key, 10, 10):
                order.append((key, number))

        tasks = [asyncio.create_task(run(key, i)) for key in "ab" for i in range(3)]
        await settle()
        slot.release()
        await asyncio.gather(*tasks)
        assert order == [(key, i) for i in range(3) for key in "ab"]

    simulate(scenario, max_running=1, max_queued_requests=6)


def test_many_sequences_are_not_starved_by_single_ones():
    async def scenario(admission, loop):
        randomness, new_key = random.Random(1), itertools.count()

        async def flood():
            while loop.time() < 1_100:  # a key that was never served would go first
                await hold(admission, f"key{next(new_key)}", randomness.uniform(0.5, 1.5))

        await hold(admission, "large", 1)
        floods = [asyncio.create_task(flood()) for _ in range(8)]
        await asyncio.sleep(5)
        async with await admission.acquire("large", 10, 10, sequences=4):
            assert loop.time() < 1_010
        await asyncio.gather(*floods)

    simulate(scenario, max_running=4, max_queued_requests=20)


def test_more_sequences_than_there_are_slots_are_refused_for_good():
    async def scenario(admission, loop):
        rejected = await refusal(admission, sequences=5)
        assert (rejected.reason, rejected.retry_after_s) == ("too_many_sequences", None)
        assert "5 sequences" in str(rejected)

        slot = await admission.acquire("a", 10, 10)
        large = asyncio.create_task(admission.acquire("a", 10, 10, sequences=4))
        await settle()
        admission.resize(0)  # no engine: it may come back as it was
        await settle()
        assert admission.waiting == 1
        admission.resize(2)  # it did not
        with pytest.raises(Rejected, match="4 sequences"):
            await large
        slot.release()
        assert admission.running == admission.waiting == 0

    simulate(scenario, max_running=4)


def test_without_an_engine_requests_wait_for_one():
    async def scenario(admission, loop):
        admission.resize(0)
        task = asyncio.create_task(admission.acquire("a", 10, 10))
        await asyncio.sleep(3)
        assert not task.done()
        admission.resize(4)
        await task

    simulate(scenario, max_running=8)


def test_fewer_slots_stop_nothing_and_start_nothing():
    async def scenario(admission, loop):
        slots = [await admission.acquire("a", 10, 10) for _ in range(4)]
        task = asyncio.create_task(admission.acquire("a", 10, 10))
        admission.resize(2)
        for slot in slots[:2]:
            slot.release()
            await settle()
            assert not task.done()
        slots[2].release()
        await task
        assert admission.running == 2

    simulate(scenario, max_running=4)


def test_batch_leaves_a_quarter_free_and_waits_for_everybody_else():
    async def scenario(admission, loop):
        started = []
        batch = [
            asyncio.create_task(hold(admission, "batch", 1, started, priority=Priority.batch))
            for _ in range(8)
        ]
        await settle()
        assert (admission.running, admission.waiting) == (6, 2)
        others = [asyncio.create_task(hold(admission, "a", 1, started)) for _ in range(4)]
        await settle()
        assert admission.running == 8
        await asyncio.gather(*batch, *others)
        assert started == ["batch"] * 6 + ["a"] * 4 + ["batch"] * 2
        rejected = await refusal(admission, sequences=7, priority=Priority.batch)
        assert rejected.reason == "too_many_sequences"

    simulate(scenario, max_running=8, max_queued_requests=8)


def test_batch_that_waits_takes_no_place_in_the_queue_from_others():
    async def scenario(admission, loop):
        tasks = [
            asyncio.create_task(hold(admission, "a", 1, priority=Priority.batch)) for _ in range(5)
        ]
        tasks.append(asyncio.create_task(hold(admission, "a", 1)))
        await settle()
        assert (admission.running, admission.waiting) == (4, 2)
        assert (await refusal(admission, priority=Priority.batch)).reason == "queue_full"
        tasks += [asyncio.create_task(hold(admission, "a", 1)) for _ in range(2)]
        await settle()
        assert (await refusal(admission)).reason == "queue_full"
        await asyncio.gather(*tasks)

    simulate(scenario, max_running=4, max_queued_requests=2)


def test_a_key_holds_no_more_sequences_than_it_may():
    async def scenario(admission, loop):
        limits = KeyLimits(max_concurrent=3)
        slots = [await admission.acquire("b", 10, 10, sequences=3)]
        slots.append(await admission.acquire("a", 10, 10, sequences=2, key_limits=limits))
        waiting = asyncio.create_task(admission.acquire("a", 10, 10, key_limits=limits))
        await settle()
        assert (await refusal(admission, key_limits=limits)).reason == "key_concurrency"
        never = await refusal(admission, sequences=4, key_limits=limits)
        assert (never.reason, never.retry_after_s) == ("key_concurrency", None)
        slots[1].release()
        await waiting
        slots.append(await admission.acquire("a", 10, 10, key_limits=limits))

    simulate(scenario, max_running=5)


def test_requests_a_minute():
    async def scenario(admission, loop):
        limits = KeyLimits(requests_per_minute=6)
        for _ in range(6):
            await hold(admission, "a", 0, key_limits=limits)
        rejected = await refusal(admission, key_limits=limits)
        assert (rejected.reason, rejected.retry_after_s) == ("key_requests", 10)
        await hold(admission, "b", 0, key_limits=limits)  # another key's is full
        await asyncio.sleep(rejected.retry_after_s)  # it is true
        await hold(admission, "a", 0, key_limits=limits)

    simulate(scenario)


def test_tokens_a_minute_are_reserved_and_what_was_not_used_is_given_back():
    async def scenario(admission, loop):
        limits = KeyLimits(tokens_per_minute=600)
        slot = await admission.acquire("a", 100, 100, sequences=4, key_limits=limits)  # 500
        rejected = await refusal(admission, "a", 100, 100, key_limits=limits)
        assert (rejected.reason, rejected.retry_after_s) == ("key_tokens", 10)
        slot.release(200)
        await admission.acquire("a", 100, 300, key_limits=limits)
        never = await refusal(admission, "a", 500, 101, key_limits=limits)
        assert (never.reason, never.retry_after_s) == ("key_tokens", None)

    simulate(scenario)


def test_a_refused_request_takes_nothing_of_the_allowances():
    async def scenario(admission, loop):
        limits = KeyLimits(requests_per_minute=2, tokens_per_minute=40)
        other = await admission.acquire("b", 10, 10)
        waiting = asyncio.create_task(admission.acquire("b", 10, 10))
        third = asyncio.create_task(admission.acquire("c", 10, 10))
        await settle()
        for _ in range(10):
            assert (await refusal(admission, key_limits=limits)).reason == "queue_full"
        other.release()
        for task in (waiting, third):
            (await task).release()
        for _ in range(2):
            await hold(admission, "a", 0, key_limits=limits)

    simulate(scenario, max_running=1)


def test_drain_refuses_the_new_and_finishes_the_old():
    async def scenario(admission, loop):
        tasks = [asyncio.create_task(hold(admission, "a", 3)) for _ in range(2)]
        await settle()
        admission.drain()
        assert (await refusal(admission)).reason == "draining"
        await admission.idle()
        assert loop.time() == 1_006
        await asyncio.gather(*tasks)

    simulate(scenario, max_running=1)


def test_four_times_too_much_work_is_refused_and_the_rest_is_not_late():
    """8 slots of about 1 s; two keys send 32 requests a second for a minute."""

    async def scenario(admission, loop):
        randomness, waits_s, done = random.Random(1), [], {"a": 0, "b": 0}

        async def request(key):
            sent_s = loop.time()
            try:
                slot = await admission.acquire(key, 10, 10, deadline_s=5)
            except Rejected as e:
                assert loop.time() == sent_s
                assert e.retry_after_s == 1
                return
            async with slot:
                waits_s.append(loop.time() - sent_s)
                await asyncio.sleep(randomness.uniform(0.5, 1.5))
                done[key] += 1

        tasks = []
        for i in range(32 * 60):
            tasks.append(asyncio.create_task(request("b" if i % 16 == 0 else "a")))
            await asyncio.sleep(1 / 32)
        await asyncio.gather(*tasks)
        total = sum(done.values())
        assert total == pytest.approx(8 * 60, rel=0.1)  # the slots were never idle
        assert admission.refused == {"queue_full": 32 * 60 - total}
        assert max(waits_s) < 2
        assert done["b"] > 0.9 * 2 * 60  # far below its half: nearly all of its requests ran

    simulate(scenario, max_running=8)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "acquire", "acquire", "release", "cancel", "pass", "resize"]),
        st.integers(0, 6),
        st.integers(1, 4),
        st.sampled_from(list(Priority)),
        st.booleans(),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None, database=None)
@given(OPERATIONS)
def test_slots_neither_leak_nor_are_given_twice(operations):
    async def scenario(admission, loop):
        tasks, held = [], []

        async def request(key, sequences, priority):
            slot = await admission.acquire(key, 5, 5, 1 + sequences, sequences, priority)
            held.append((slot, sequences))

        for what, number, sequences, priority, settled in operations:
            before = admission.running
            if what == "acquire":
                task = asyncio.create_task(request(f"key{number}", sequences, priority))
                tasks.append(task)
            elif what == "release" and held:
                held.pop(number % len(held))[0].release(number)
            elif what == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif what == "pass":
                await asyncio.sleep(number / 2)
            elif what == "resize":
                admission.resize(number)
            if settled:
                await settle()
                assert admission.running == sum(n for _, n in held)
            assert admission.running <= max(before, admission.max_running)
            assert admission.waiting <= 2 * 2 * 3  # per priority, with the places for other keys
        admission.resize(4)
        while admission.running or admission.waiting:
            await settle()
            while held:
                held.pop()[0].release()
        await admission.idle()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            expected = Rejected | DeadlineExpired | asyncio.CancelledError | None
            assert isinstance(result, expected), result
        while held:
            held.pop()[0].release()
        assert (admission.running, admission.waiting, admission.waiting_tokens) == (0, 0, 0)
        assert [await admission.acquire("a", 5, 5) for _ in range(4)]

    simulate(scenario, max_running=4, max_queued_requests=3)


@pytest.mark.parametrize(
    "limits", [{"max_running": 0}, {"max_queued_requests": -1}, {"request_timeout_s": 0}]
)
def test_limits_that_mean_nothing_are_refused(limits):
    with pytest.raises(ConfigError, match=next(iter(limits))):
        Limits(**limits)
