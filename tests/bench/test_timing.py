"""What a measurement counts, on machines that are clocks."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from svdq_cli.bench import timing
from svdq_cli.bench.timing import measure, measure_in_turns, spread

CUDA = torch.device("cuda", 0)
LAUNCH_US, KERNEL_US = 20.0, 5.0


class FakeGpu:
    """Launching costs the CPU more than the GPU takes to run; replaying a graph costs the CPU once."""

    def __init__(self, capturable: bool) -> None:
        self.cpu = self.gpu = 0.0  # microseconds
        self.capturable = capturable
        self.capturing: list[float] | None = None

    def run(self, us: float) -> None:
        self.gpu = max(self.gpu, self.cpu) + us

    def call(self) -> None:
        if self.capturing is not None:
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.capturing.append(KERNEL_US)
            return
        self.cpu += LAUNCH_US
        self.run(KERNEL_US)

    def synchronize(self, device: object = None) -> None:
        self.cpu = self.gpu = max(self.cpu, self.gpu)


def on_gpu(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
    class Graph:
        def __init__(self) -> None:
            self.kernels: list[float] = []

        def replay(self) -> None:
            gpu.cpu += LAUNCH_US
            gpu.run(sum(self.kernels))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            gpu.run(0.0)
            self.at = gpu.gpu

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) / 1e3

    @contextmanager
    def graph(into: Graph):
        gpu.capturing = into.kernels
        try:
            yield
        finally:
            gpu.capturing = None

    @contextmanager
    def device(index: object):
        yield

    for name, value in {
        **{"CUDAGraph": Graph, "Event": Event, "graph": graph, "device": device},
        "synchronize": gpu.synchronize,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.cpu / 1e6)


def test_a_short_kernel_is_timed_without_the_cpus_launch(monkeypatch: pytest.MonkeyPatch):
    gpu = FakeGpu(capturable=True)
    on_gpu(monkeypatch, gpu)
    found = measure([gpu.call] * 3, seconds=0.01, device=CUDA)
    assert found.median == pytest.approx(KERNEL_US, rel=0.01)


def test_what_cant_be_captured_is_timed_call_by_call(monkeypatch: pytest.MonkeyPatch):
    gpu = FakeGpu(capturable=False)
    on_gpu(monkeypatch, gpu)
    assert measure([gpu.call] * 3, seconds=0.01, device=CUDA).median >= KERNEL_US


class FakeCpu:
    """Takes 0.3 % longer for each call than for the one before."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.slower = 1.0
        self.called: list[str] = []

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.called.append(name)
            self.seconds += seconds * self.slower
            self.slower *= 1.003

        return run


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> FakeCpu:
    cpu = FakeCpu()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: cpu.seconds)
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: round(cpu.seconds * 1e9))
    return cpu


def test_ways_that_take_turns_are_compared_fairly_on_a_machine_that_slows_down(
    monkeypatch: pytest.MonkeyPatch,
):
    cpu = on_cpu(monkeypatch)
    ways = [[cpu.call("bare", 1.0)], [cpu.call("whole", 1.04)]]
    bare, whole = measure_in_turns(ways, seconds=30.0)
    assert max(bare) > 1.1 * min(bare)
    # In a round the two are one call apart: 0.3 %
    assert spread(whole).median / spread(bare).median == pytest.approx(1.04, abs=0.005)


def test_ways_that_take_turns_are_called_equally_often_and_each_first_in_some_rounds(
    monkeypatch: pytest.MonkeyPatch,
):
    cpu = on_cpu(monkeypatch)
    ways = [[cpu.call(name, 0.01)] for name in "abc"]
    samples = measure_in_turns(ways, seconds=0.06)
    rounds = len(samples[0])
    assert [len(each) for each in samples] == [rounds] * 3
    measured = cpu.called[-3 * rounds :]
    in_rounds = [measured[i : i + 3] for i in range(0, len(measured), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in in_rounds)
    assert {each[0] for each in in_rounds} == set("abc")
