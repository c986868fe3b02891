"""How benchmarks measure: calls by turns in one process, so that a busy machine slows them alike."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Calls = dict[str, Callable[[], Any]]


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds of a call among `repeats` in a row: by events on a CUDA device, or else by the host."""
    synchronize(device)
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            start.record()
            for _ in range(repeats):
                call()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def time_by_turns(
        calls: Calls,
        device: torch.device,
        seconds: float,
        min_rounds: int,
        max_rounds: int,
) -> dict[str, float]:
    """Median seconds of each call.

    On a CUDA device a turn is as many calls in a row as take some 0.1 s: the host runs ahead of the device, as in
    training and in answering batch after batch, and what it does meanwhile costs nothing.

    Args:
        calls: each is called once to warm up, a few times on a CUDA device, and then in turn, once a round.
        device: that they run on.
        seconds: after which no further round begins.
        min_rounds: however long they take.
        max_rounds: however short they are.
    """
    repeats = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        for _ in range(3 if device.type == "cuda" else 1):  # kernels are chosen and memory is reserved
            call()
        if device.type == "cuda":
            repeats[name] = min(20, math.ceil(0.1 / measure_seconds(call, device)))
    measured: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() > end:
            break
        for name, call in calls.items():
            measured[name].append(measure_seconds(call, device, repeats[name]))
    return {name: statistics.median(each) for name, each in measured.items()}


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most memory that a call holds at one time beyond what was held before it."""
    call()
    synchronize(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = most = 0
    # torch's own tables give sums by operator; the peak needs the order of events
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
