"""The benchmarks of the queue's own parts run: what nobody runs stops working."""

import sys

import pytest

from tests.benchmarks import bench_dispatch


@pytest.mark.parametrize("kind", ["none", "memory", "sqlite"])
def test_every_part_of_the_dispatch_benchmark_runs_all_of_its_tasks(kind, monkeypatch, capsys):
    arguments = ["--queue", kind, "--tasks", "20", "--rounds", "1", "--concurrency", "4"]
    monkeypatch.setattr(sys, "argv", ["bench_dispatch", *arguments])
    bench_dispatch.main()
    parts = [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert parts == list(bench_dispatch.PARTS)
