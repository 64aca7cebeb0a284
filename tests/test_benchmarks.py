"""The benchmarks of the queue's own parts run: what nobody runs stops working."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.benchmarks import bench_dispatch, counts
from tests.benchmarks.peers import __main__ as peers
from tests.benchmarks.peers import drawing
from tests.benchmarks.peers.adapters import SYSTEMS


@pytest.mark.parametrize("kind", ["none", "memory", "sqlite"])
def test_every_part_of_the_dispatch_benchmark_runs_all_of_its_tasks(kind, monkeypatch, capsys):
    arguments = ["--queue", kind, "--tasks", "20", "--rounds", "1", "--concurrency", "4"]
    monkeypatch.setattr(sys, "argv", ["bench_dispatch", *arguments])
    bench_dispatch.main()
    parts = [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert parts == list(bench_dispatch.PARTS)


def test_a_task_takes_no_more_calls_and_statements_than_are_stored():
    if counts.stored() is None:
        pytest.skip(f"nothing is stored for Python {counts.VERSION}: python -m tests.benchmarks.counts --renew")
    command = [sys.executable, "-m", "tests.benchmarks.counts"]  # other tests leave types and handlers behind
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_takes_a_twentieth_more_calls_is_told():
    stored = {"same": 100.0, "less": 100.0, "more": 100.0}
    assert counts.over({"same": 105.0, "less": 1.0, "more": 105.1, "new": 1.0}, stored) == {
        "more": (105.1, 100.0),
        "new": (1.0, None),
    }


@pytest.mark.parametrize(
    ("name", "batches"),
    [("safedefer, SQLite", {"many"}), ("Huey, SQLite with fsync", set())],
    ids=["safedefer", "huey"],
)
def test_a_system_of_the_comparison_runs_what_its_producers_enqueue(name, batches, monkeypatch, tmp_path):
    system = SYSTEMS[name]
    monkeypatch.setattr(system, "kinds", ("def",))
    monkeypatch.setattr(peers, "IDLE_SECONDS", 0.0)
    runner = peers.Runner({"main": sys.executable}, tmp_path)
    assert runner.ask(system, "versions", *system.packages)["missing"] == []
    figures = runner.measure(system, tasks=20, paced=2)
    assert figures.keys() == {"one", "def", "p50", "p99"} | batches
    assert all(value > 0 for value in figures.values())


def test_a_system_that_is_not_installed_is_left_out_and_the_report_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(SYSTEMS["Huey, Redis"], "packages", ("no_such_package",))
    runner = peers.Runner({"main": sys.executable}, tmp_path)
    report = peers.compare(runner, [SYSTEMS["Huey, Redis"]], rounds=1, tasks=20, paced=2)
    assert report["left out"] == {"Huey, Redis": "not installed: no_such_package"}
    assert "Left out: Huey, Redis, not installed: no_such_package." in drawing.table(report)


REPORT = {
    "machine": {"cores": 2, "python": "3.11.7", "load before": 1.0, "load after": 2.0},
    "options": {"rounds": 3, "tasks": 1000, "paced": 100},
    "systems": {
        "safedefer, SQLite": {"versions": {"safedefer": "1"}, "guarantees": ["signed"], "at once": "16", "tasks": 1000},
        "Celery": {"versions": {"celery": "5"}, "guarantees": ["acks late"], "at once": "1", "tasks": 250},
    },
    "left out": {"RQ": "not installed: rq"},
    "rounds": [
        {
            "safedefer, SQLite": {"async": mine, "one": 50.0, "many": 400.0, "p50": 0.004, "p99": 0.02},
            "Celery": {"def": 100.0, "one": 100.0, "p50": 0.002, "p99": 0.01},
        }
        for mine in (500.0, 300.0, 900.0)
    ],
}


def test_the_table_gives_medians_and_the_ratios_of_each_round_with_their_range():
    lines = drawing.table(REPORT).splitlines()
    assert "| safedefer, SQLite | 500 |  | 50.0 | 400 | 4.00 | 20.0 |" in lines
    assert (
        "| safedefer, SQLite | 5.00 (3.00 to 9.00) |  | 0.50 (0.50 to 0.50) | 4.00 (4.00 to 4.00)"
        " | 2.00 (2.00 to 2.00) | 2.00 (2.00 to 2.00) |" in lines
    )
    assert "| safedefer, SQLite | safedefer 1 | 1,000 | 16 | signed |" in lines


def test_the_drawing_has_a_bar_for_each_system_as_long_as_its_figure():
    drawn = ElementTree.fromstring(drawing.svg(REPORT))
    bars = [element for element in drawn.iter("{http://www.w3.org/2000/svg}rect") if element.get("x")]
    lengths = [float(bar.get("width")) for bar in bars]
    assert len(bars) == 4
    assert [lengths[1] / lengths[0], lengths[2] / lengths[3]] == pytest.approx([0.2, 0.5], abs=0.001)


def test_the_docs_take_the_table_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before {peers.BEGIN} old {peers.END} after")
    peers.write_docs(REPORT, page)
    assert page.read_text() == f"before {peers.BEGIN}\n\n{drawing.table(REPORT)}\n{peers.END} after"
    assert (tmp_path / "peers.svg").exists()
    assert peers.PAGE.read_text().count(peers.BEGIN) == peers.PAGE.read_text().count(peers.END) == 1
