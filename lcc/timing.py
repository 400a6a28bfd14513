"""Timing that can be believed: rivals take turns in one run, and the spread is part of the result.

A round times every rival in turn, several runs each after one that is not timed (it brings the rival's
weights back into the caches, as in steady use). A speed-up is the median over rounds of the ratio within the
round, so that slow drift of the machine cancels.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from lcc.errors import RecipeError
from lcc.specs import Frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Call = Callable[[], object]

ROUNDS, RUNS = 10, 4  # timed runs: ROUNDS * RUNS
MIN_RUNS = 30
NOISY = 0.10  # of the median: a larger interquartile range is noise
STABLE = 0.05  # warm-up ends when the median of three runs is this close to that of the three before
WARM_UP_RUNS, WARM_UP_SECONDS = 30, 5.0  # or after that many runs, or that long


class Latency(Frozen):
    """Milliseconds of one run: median and spread over all timed runs; `noisy`: too wide a spread to trust."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    iqr_ms: float
    runs: int
    noisy: bool


class Speedup(Frozen):
    """How many times faster than the first rival: median, 10th and 90th percentile over rounds."""

    median: float
    p10: float
    p90: float


def interleave(
    calls: Mapping[str, Call], *, rounds: int = ROUNDS, wait: Call = lambda: None
) -> tuple[dict[str, Latency], dict[str, Speedup]]:
    """Time calls in turns after a warm-up; `wait` returns when the device has finished.

    Returns latencies by name, and the speed-ups of all but the first over the first.
    Raises: RecipeError: too few rounds.
    """
    if rounds * RUNS < MIN_RUNS:
        enough = -(-MIN_RUNS // RUNS)
        raise RecipeError(f"{rounds} rounds of {RUNS} runs are too few to trust; give at least {enough}")
    for call in calls.values():
        _warm_up(call, wait)
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            times[name].append([seconds_of(call, wait) for _ in range(RUNS)])
    baseline, *others = times
    medians = {name: np.median(per_round, axis=1) for name, per_round in times.items()}
    latencies = {name: _latency(np.concatenate(per_round)) for name, per_round in times.items()}
    return latencies, {name: _speedup(medians[baseline] / medians[name]) for name in others}


def _warm_up(call: Call, wait: Call) -> None:
    times: list[float] = []
    while len(times) < WARM_UP_RUNS and (len(times) < 3 or sum(times) < WARM_UP_SECONDS):
        times.append(seconds_of(call, wait))
        if len(times) >= 6:
            before, now = statistics.median(times[-6:-3]), statistics.median(times[-3:])
            if abs(now - before) <= STABLE * before:
                return


def seconds_of(call: Call, wait: Call) -> float:
    """Return the seconds of one call; `wait` returns when the device has finished."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _latency(seconds: NDArray[Any]) -> Latency:
    p10, p25, median, p75, p90 = (float(q) * 1e3 for q in np.percentile(seconds, [10, 25, 50, 75, 90]))
    iqr = p75 - p25
    return Latency(
        median_ms=median, p10_ms=p10, p90_ms=p90, iqr_ms=iqr, runs=len(seconds), noisy=iqr > NOISY * median
    )


def _speedup(ratios: NDArray[Any]) -> Speedup:
    p10, median, p90 = (float(q) for q in np.percentile(ratios, [10, 50, 90]))
    return Speedup(median=median, p10=p10, p90=p90)
