"""Writes docs/performance.md and docs/performance.svg from the records: `python -m benchmarks.performance`.

Nothing is measured here, and nothing else is written by hand into the two files; a test regenerates them and compares.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import record
from .record import SAME
from .report import counts, is_beaten

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"

# The machines by the first part of a record's name, in the order of the page.
MACHINES = {
    "zen5": "AMD EPYC with Zen 5",
    "xeon-amx": "Intel Xeon with AMX",
    "h200": "NVIDIA H200",
}
HEAD = """# Performance

`python -m benchmarks.performance` writes this page and the picture from [benchmarks/results](../benchmarks/results).
[benchmarks.md](benchmarks.md) says how the numbers are taken. *Ratio* is the fastest peer's time over ours: above 1 our
kernel is faster. *Peak* is the share of the peak that the same run measured: of the machine's arithmetic, or of its
memory bandwidth where memory is the limit. Times are medians in milliseconds. A question mark stands where fewer
samples counted than the run asked for.

![The fastest peer's time over ours, by machine, op and dtype](performance.svg)
"""


class Standing(NamedTuple):
    """A group of cases, of which at least one has a ratio."""

    name: str
    results: list[Mapping[str, Any]]

    @property
    def ratios(self) -> list[float]:
        return [result["ratio"] for result in self.results if result["ratio"] is not None]

    @property
    def mean(self) -> float:
        return math.exp(sum(map(math.log, self.ratios)) / len(self.ratios))


def records(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The records by machine and op ("zen5-loss"), in the order of MACHINES; without those of runs beside busy
    processes, whose times are not the kernels' alone."""
    found = [path for machine in MACHINES for path in sorted(folder.glob(f"{machine}-*.json"))]
    by_name = {path.stem: record.read(path) for path in found}
    return {name: of_machine for name, of_machine in by_name.items() if record.beside(of_machine) == 0}


def page(by_name: Mapping[str, Mapping[str, Any]]) -> str:
    parts = [HEAD, _summary(by_name), _slower(by_name)]
    for name, of_machine in by_name.items():
        parts += [f"## {_title(name)}\n", _runs(of_machine)]
        for op in dict.fromkeys(result["op"] for result in of_machine["results"]):
            results = [result for result in of_machine["results"] if result["op"] == op]
            parts += [f"### {op}\n", _table(results, of_machine)]
    return "\n".join(parts)


def _title(name: str) -> str:
    machine = next(machine for machine in MACHINES if name.startswith(f"{machine}-"))
    return f"{MACHINES[machine]}: {name.removeprefix(f'{machine}-').replace('-', ' ')}"


def _all_runs(of_machine: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [of_machine, *of_machine.get("earlier", ())]


def _summary(by_name: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [_title(name).split(":")[0], group.name, len(group.results), *counts(group.results), f"{group.mean:.2f}"]
        for name, of_machine in by_name.items()
        for group in _standings(of_machine, "op", curves=True)
    ]
    return _markdown(["machine", "op", "cases", "faster", "same", "slower", "geometric mean of the ratios"], rows)


def _standings(of_machine: Mapping[str, Any], *fields: str, curves: bool) -> list[Standing]:
    """The standing of each op, or op and dtype."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in of_machine["results"]:
        if curves or result["point"] is None:
            groups.setdefault(" ".join(result[field] for field in fields), []).append(result)
    return [group for name, results in groups.items() if (group := Standing(name, results)).ratios]


def _slower(by_name: Mapping[str, Mapping[str, Any]]) -> str:
    """Every case that a peer wins by more than 2%."""
    rows = [
        [_title(name).split(":")[0], f"{result['op']} {_case(result)}", result["best_peer"], _ratio(result)]
        for name, of_machine in by_name.items()
        for result in of_machine["results"]
        if is_beaten(result)
    ]
    head = f"## Slower than a peer\n\n{len(rows)} cases, by more than {100 * SAME:.0f}%.\n\n"
    return head + _markdown(["machine", "case", "peer", "ratio"], rows)


def _runs(of_machine: Mapping[str, Any]) -> str:
    """What was run, when, at which commit."""
    on = of_machine["gpus"][0] if of_machine["device"] == "cuda" else f"{of_machine['cpu']}, {of_machine['isa']}"
    threads = "" if of_machine["device"] == "cuda" else f", {of_machine['threads']} threads"
    lines = [f"{on}{threads}, torch {of_machine['versions']['torch']}.\n"]
    for number, run in enumerate(_all_runs(of_machine), 1):
        environment = "".join(f"{name}={value} " for name, value in run["environment"].items())
        lines.append(f"{number}. {run['date'][:10]}, commit {run['commit']}: `{environment}{run['command']}`")
    return "\n".join(lines) + "\n"


def _table(results: Sequence[Mapping[str, Any]], of_machine: Mapping[str, Any]) -> str:
    numbers = {record.run_label(run): number for number, run in enumerate(_all_runs(of_machine), 1)}
    rows = []
    for result in results:
        ours = next((row for row in result["contenders"] if row["ours"]), record.ROW)
        best = next((row for row in result["contenders"] if row["name"] == result["best_peer"]), record.ROW)
        peer = f"{_ms(best['median_ms'])} ({best['name']})" if best["median_ms"] else "none was timed"
        share = ours.get("share_of_peak")
        peak = f"{100 * share:.0f}%" if share else ""
        rows.append([_case(result), _ms(ours["median_ms"]), peer, _ratio(result), peak, numbers[result["run"]]])
    return _markdown(["case", "ours", "best peer", "ratio", "peak", "run"], rows)


def _case(result: Mapping[str, Any]) -> str:
    return f"{result['case']} {result['dtype']} {result['direction']}"


def _ms(median: float | None) -> str:
    return f"{median:.4g}" if median else "not timed"


def _ratio(result: Mapping[str, Any]) -> str:
    if result["ratio"] is None:
        return ""
    return f"{result['ratio']:.2f}" + ("" if result["sure"] else "?")


def _markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


# The picture: a bar to the geometric mean, a line from the least to the largest ratio, on a logarithmic axis.
WIDTH, LEFT, RIGHT, TOP, ROW = 760, 260, 60, 34, 22
LEAST, MOST = 0.125, 32.0
TICKS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
COLOURS = {"zen5": "#2f6f4f", "xeon-amx": "#2a5d9c", "h200": "#7a9a01"}


def picture(by_name: Mapping[str, Mapping[str, Any]]) -> str:
    """The SVG."""
    rows = [
        (name, standing)
        for name, of_machine in by_name.items()
        for standing in _standings(of_machine, "op", "dtype", curves=False)
    ]
    height = TOP + ROW * len(rows) + 14
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12" fill="#24292f">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="12">the fastest peer\'s time over ours: geometric mean, and from least to largest</text>',
    ]
    for tick in TICKS:
        x, colour = _x(tick), "#24292f" if tick == 1 else "#d0d7de"
        lines.append(f'<path d="M{x:.1f} {TOP - 4}V{height - 10}" stroke="{colour}"/>')
        lines.append(f'<text x="{x:.1f}" y="{TOP - 8}" text-anchor="middle">{tick:g}x</text>')
    for number, (name, standing) in enumerate(rows):
        lines += _bar(name, standing, TOP + ROW * number)
    return "\n".join([*lines, "</svg>\n"])


def _bar(name: str, standing: Standing, y: float) -> list[str]:
    machine = next(machine for machine in MACHINES if name.startswith(f"{machine}-"))
    label = f"{machine} {standing.name}"
    one, mean, middle = _x(1.0), _x(standing.mean), y + ROW / 2
    least, most = _x(min(standing.ratios)), _x(max(standing.ratios))
    left, width = min(one, mean), abs(mean - one)
    return [
        f'<text x="{LEFT - 10}" y="{middle + 4:g}" text-anchor="end">{label} ({len(standing.ratios)})</text>',
        f'<rect x="{left:.1f}" y="{y + 4:g}" width="{width:.1f}" height="{ROW - 8}" fill="{COLOURS[machine]}"/>',
        f'<path d="M{least:.1f} {middle:g}H{most:.1f}" stroke="#24292f"/>',
        f'<text x="{max(one, mean, most) + 6:.1f}" y="{middle + 4:g}">{standing.mean:.2f}x</text>',
    ]


def _x(ratio: float) -> float:
    ratio = min(max(ratio, LEAST), MOST)
    return LEFT + (WIDTH - LEFT - RIGHT) * math.log(ratio / LEAST) / math.log(MOST / LEAST)


def stale() -> list[str]:
    """The files that the records no longer give."""
    made = _files()
    return [path.name for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def _files() -> dict[Path, str]:
    by_name = records()
    return {PAGE: page(by_name), PICTURE: picture(by_name)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file is stale")
    if parser.parse_args(argv).check:
        names = stale()
        print("\n".join(f"{name} is stale: run python -m benchmarks.performance" for name in names))
        return 1 if names else 0
    for path, text in _files().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
