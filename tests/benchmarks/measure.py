"""Interleaved timing, the ratio of medians with its interval, and a process's own peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

PAIRS = 30  # rounds where a pair of calls takes less than PAIR_SECONDS ...
PAIR_SECONDS = 2.0
FEW_PAIRS = 5  # ... and where it takes longer


class Ratio(NamedTuple):
    """A ratio of medians and its bootstrap 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Times every call once per round, the order rotated, so that drift hits all alike.

    Args:
        clock (callable): `time.process_time` counts the process's own work alone, for a machine
            that others use, too.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            times[name].append(seconds(calls[name], clock))
    return {name: np.array(values) for name, values in times.items()}


def ratio_of_medians(over: np.ndarray, under: np.ndarray, resamples: int = 10_000) -> Ratio:
    """median(over) / median(under); whole rounds are resampled, because they were interleaved."""
    rng = np.random.default_rng(0)
    draws = rng.integers(len(over), size=(resamples, len(over)))
    ratios = np.median(over[draws], 1) / np.median(under[draws], 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Ratio(float(np.median(over) / np.median(under)), float(low), float(high))


def peak_mib() -> float:
    """The largest resident size that this process itself has had, in MiB."""
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmHWM"].split()[0]) / 1024
    except OSError:  # not Linux. There ru_maxrss would carry the parent's size over
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)
