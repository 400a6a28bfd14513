import pytest

from lcc import timing
from lcc.errors import RecipeError
from lcc.timing import interleave


class Clock:
    """A clock that only calls move, each by its own time and by how much the machine has slowed down."""

    def __init__(self, monkeypatch):
        self.now, self.slowdown, self.calls = 0.0, 1.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name, seconds, drift=1.0):
        def run():
            self.calls.append(name)
            self.now += seconds() * self.slowdown if callable(seconds) else seconds * self.slowdown
            self.slowdown *= drift

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_rivals_take_turns_in_every_round_each_after_a_run_that_is_not_timed(clock):
    interleave({"a": clock.call("a", 3.0), "b": clock.call("b", 1.0)}, rounds=8)
    rounds = clock.calls[-8 * 2 * (timing.RUNS + 1) :]
    assert rounds == (["a"] * (timing.RUNS + 1) + ["b"] * (timing.RUNS + 1)) * 8


def test_a_speed_up_is_the_ratio_to_the_first(clock):
    latencies, speedups = interleave({"a": clock.call("a", 3.0), "b": clock.call("b", 1.0)})
    assert latencies["a"].median_ms == pytest.approx(3000)
    assert latencies["b"].runs == timing.ROUNDS * timing.RUNS
    assert list(speedups) == ["b"]
    assert speedups["b"].median == pytest.approx(3)


def test_a_machine_that_slows_down_does_not_change_the_speed_up(clock):
    calls = {name: clock.call(name, seconds, drift=1.005) for name, seconds in (("a", 3.0), ("b", 1.0))}
    latencies, speedups = interleave(calls)
    assert latencies["a"].p90_ms > 1.3 * latencies["a"].p10_ms
    assert speedups["b"].p10 == pytest.approx(3, rel=0.03)
    assert speedups["b"].p90 == pytest.approx(3, rel=0.03)


def test_a_wide_spread_is_called_noisy_and_a_narrow_one_is_not(clock):
    durations = iter([1.0, 1.3] * 200)
    latencies, _ = interleave(
        {"steady": clock.call("a", 1.0), "jumpy": clock.call("b", lambda: next(durations))}
    )
    assert not latencies["steady"].noisy
    assert latencies["jumpy"].noisy


def test_warming_up_goes_on_until_times_are_stable(clock):
    durations = iter([8.0] * 3 + [1.0] * 200)
    timing._warm_up(clock.call("a", lambda: next(durations) / 100), lambda: None)
    assert len(clock.calls) == 8  # of the last six, the median of the first three is no longer slow


def test_warming_up_a_slow_call_ends_after_some_seconds(clock):
    timing._warm_up(clock.call("a", 4.0), lambda: None)
    assert len(clock.calls) == 3


def test_too_few_rounds_are_refused_with_the_number_that_is_enough(clock):
    with pytest.raises(RecipeError, match="at least 8"):
        interleave({"a": clock.call("a", 1.0)}, rounds=7)


def test_the_device_is_waited_for_before_and_after_every_timed_run(clock):
    waits = []
    interleave({"a": clock.call("a", 1.0)}, rounds=8, wait=lambda: waits.append(len(clock.calls)))
    timed = len(clock.calls) - 8  # one run of each round is not timed
    assert len(waits) == 2 * timed
