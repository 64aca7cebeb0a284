"""The report of ``python -m tests.benchmarks.peers`` as Markdown tables and as an SVG drawing."""

from __future__ import annotations

import statistics
from html import escape

FIGURES = {
    "async": "execute `async def`/s",
    "def": "execute `def`/s",
    "one": "enqueue one by one/s",
    "many": "enqueue by 100/s",
    "p50": "p50 ms",
    "p99": "p99 ms",
}
BASES = ("Celery", "Huey, SQLite with fsync")
#: Without the figure of its own kind, a base gives this one.
INSTEAD = {"async": "def", "many": "one"}
OURS, OTHERS = "#3f51b5", "#9e9e9e"
BAR, LEFT, WIDTH = 20, 220, 760


def values(report: dict, system: str, figure: str) -> list[float]:
    """Return a figure of each round that has it."""
    found = [figures[system][figure] for figures in report["rounds"] if figure in figures.get(system, {})]
    return [value * 1000 for value in found] if figure.startswith("p") else found


def ratios(report: dict, system: str, figure: str, base: str) -> list[float]:
    """Return the ratio to the base of each round that has both."""
    found = []
    for figures in report["rounds"]:
        mine, others = figures.get(system, {}).get(figure), figures.get(base, {})
        theirs = others.get(figure, others.get(INSTEAD.get(figure, figure)))
        if mine and theirs:
            found.append(mine / theirs)
    return found


def short(value: float) -> str:
    """Return a number with three digits that count, or thousands in full."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _rows(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)] + [""]


def table(report: dict) -> str:
    """Return the medians, the ratios to each base with their range, and what each system guarantees."""
    machine, systems = report["machine"], report["systems"]
    load = f"load average {machine['load before']:.1f} before and {machine['load after']:.1f} after"
    rounds = f"{len(report['rounds'])} interleaved rounds of up to {report['options']['tasks']:,} tasks"
    lines = [f"{rounds}, medians; {machine['cores']} cores, Python {machine['python']}, {load}.", ""]
    rows = []
    for system in systems:
        found = [values(report, system, figure) for figure in FIGURES]
        rows.append([system, *(short(statistics.median(each)) if each else "" for each in found)])
    lines += _rows(["", *FIGURES.values()], rows)
    for base in (base for base in BASES if base in systems):
        lines += [f"As ratios to {base} in the same round, median (lowest to highest):", ""]
        rows = []
        for system in systems:
            found = [sorted(ratios(report, system, figure, base)) for figure in FIGURES]
            cells = [f"{short(statistics.median(e))} ({short(e[0])} to {short(e[-1])})" if e else "" for e in found]
            rows.append([system, *cells])
        lines += _rows(["", *(head.removesuffix("/s").removesuffix(" ms") for head in FIGURES.values())], rows)
    rows = []
    for system, facts in systems.items():
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        rows.append([system, versions, f"{facts['tasks']:,}", facts["at once"], "; ".join(facts["guarantees"])])
    lines += _rows(["", "versions", "tasks", "at once in the worker process", "guarantees as measured"], rows)
    for system, reason in report["left out"].items():
        lines += [f"Left out: {system}, {' '.join(reason.split())[:300]}.", ""]
    return "\n".join(lines)


def svg(report: dict) -> str:
    """Return bars: the higher rate of ``async def`` and ``def``, and the median latency."""
    parts: list[str] = []
    top = 0
    for title, figures, pick in (
        ("No-op tasks a second, one worker process (more is better)", ("async", "def"), max),
        ("From enqueueing to the begin of the task, p50 in ms at 50 tasks/s (less is better)", ("p50",), min),
    ):
        bars = {}
        for system in report["systems"]:
            found = [statistics.median(each) for figure in figures if (each := values(report, system, figure))]
            if found:
                bars[system] = pick(found)
        longest = max(bars.values(), default=1.0)
        parts.append(f'<text x="10" y="{top + 24}" font-weight="bold">{escape(title)}</text>')
        top += 36
        for system, value in sorted(bars.items(), key=lambda bar: bar[1], reverse=pick is max):
            length = max(value / longest * (WIDTH - LEFT - 80), 1.0)
            color = OURS if system.startswith("safedefer") else OTHERS
            parts += [
                f'<text x="{LEFT - 8}" y="{top + 14}" text-anchor="end">{escape(system)}</text>',
                f'<rect x="{LEFT}" y="{top + 2}" width="{length:.1f}" height="{BAR - 5}" fill="{color}"/>',
                f'<text x="{LEFT + length + 6:.1f}" y="{top + 14}">{short(value)}</text>',
            ]
            top += BAR
        top += 16
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>', *parts, "</svg>", ""])
