"""The record of a run (JSON), and what people read of it: text for the terminal, a self-contained HTML page."""

from __future__ import annotations

import base64
import datetime
import html
import io
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpt4v_fast as gf
from gpt4v_fast import doctor

from .registry import Case
from .timing import Measurement, Settings, Timing

SCHEMA = 2  # 2: error is in shares of what rounding explains (check.py); 1: of the row's scale
SAME = 0.02  # a difference that is not worth a word
BUSY = 0.5  # load per core before a run above which its times are noise


def new_record(command: str, threads: int, settings: Settings, peaks: Mapping[str, float]) -> dict[str, Any]:
    """Everything that a reader needs to repeat or to judge the run, without its results."""
    machine = doctor.machine()
    return {
        "schema": SCHEMA,
        "command": command,
        "date": _now(),
        "commit": commit(),
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "gpus": machine["gpus"],
        "isa": machine["isa"],
        "threads": threads,
        "versions": {"gpt4v_fast": gf.__version__, **doctor.versions()},
        "environment": doctor.environment(),
        "load": {"before": load(), "after": None},
        "settings": asdict(settings),
        "peaks": dict(peaks),
        "complete": False,
        "results": [],
    }


def finish_record(record: dict[str, Any]) -> None:
    record["finished"] = _now()
    record["load"]["after"] = load()


def load() -> list[float] | None:
    """The machine's load averages of 1, 5 and 15 minutes, where it has them."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def commit() -> str | None:
    """The commit of the source tree this runs from, with "-dirty" behind it where files differ; None in an install."""
    root = Path(gf.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        name = _git(root, "rev-parse", "--short=12", "HEAD")
        return name + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def timing_fields(timing: Timing, work: float, peak: float | None) -> dict[str, Any]:
    """What a contender's row says of its time; `work` is in the case's GFLOP or GB, `rate` per second."""
    median = timing.median_s
    rate = None if median is None else work / median
    return {
        "median_ms": _ms(median),
        "p20_ms": _ms(timing.quantile_s(0.2)),
        "p80_ms": _ms(timing.quantile_s(0.8)),
        "samples_ms": [_ms(s) for s in timing.samples_s],
        "dropped": timing.dropped,
        "calls_per_sample": timing.calls_per_sample,
        "rate": rate,
        "share_of_peak": None if rate is None or not peak else rate / peak,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 6)


def result(case: Case, unit: str, measured: Measurement, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A case's part of the record, with our standing against the fastest peer."""
    timed = [row for row in rows if row["status"] == "timed"]
    ours = min((row["median_ms"] for row in timed if row["ours"]), default=None)
    best = min((row for row in timed if not row["ours"]), key=lambda row: row["median_ms"], default=None)
    ratio = best["median_ms"] / ours if best and ours else None
    probes = measured.probes
    return {
        "op": case.op,
        "case": case.name,
        "dtype": case.dtype_name,
        "direction": case.direction,
        "shape": dict(case.shape),
        "flops": case.flops,
        "bytes": case.bytes,
        "bound": case.bound,
        "unit": unit,
        "peak": {
            "median": measured.peak,
            "least": min(probes, default=None),
            "most": max(probes, default=None),
        },
        "contenders": list(rows),
        "best_peer": best["name"] if best else None,
        "ratio": ratio,
        # A row with a time and a reason has too few samples.
        "sure": ratio is not None and not any(row["reason"] for row in timed if row["ours"] or row is best),
        "verdict": verdict(ratio, best["name"] if best else None),
    }


def verdict(ratio: float | None, peer: str | None) -> str:
    """Our standing in words; `ratio` is the best peer's time over ours."""
    if ratio is None:
        return "no comparison"
    if abs(ratio - 1.0) <= SAME:
        return f"as fast as {peer}"
    return f"{ratio:.2f}x faster than {peer}" if ratio > 1 else f"slower than {peer}: {1 / ratio:.2f}x its time"


def standing(result: Mapping[str, Any]) -> str:
    """The verdict, with a word of doubt where few samples counted."""
    unsure = result["ratio"] is not None and not result["sure"]
    return result["verdict"] + (" (unsure: too few samples counted)" if unsure else "")


def case_text(result: Mapping[str, Any]) -> str:
    """One case for the terminal: a line per contender and the verdict."""
    shape = " ".join(f"{name}={size}" for name, size in result["shape"].items())
    peak = result["peak"]["median"]
    head = f"{result['op']} {result['case']} {result['dtype']} {result['direction']}  ({shape})"
    if peak is not None:
        head += f"  peak {peak:.0f} {result['unit']}"
    return "\n".join([head, *(f"  {line}" for line in _rows(result)), f"  => {standing(result)}"])


def _rows(result: Mapping[str, Any]) -> list[str]:
    return [f"{row['name']:<38} {' '.join(_cells(row, result['unit']))}" for row in result["contenders"]]


def _cells(row: Mapping[str, Any], unit: str) -> list[str]:
    if row["status"] != "timed":
        return [f"{row['status']}: {row['reason']}"]
    share = row["share_of_peak"]
    cells = [
        f"{row['median_ms']:10.3f} ms",
        f"({row['p20_ms']:.3f} to {row['p80_ms']:.3f})".ljust(24),
        f"{row['rate']:8.1f} {unit}",
        f"{100 * share:5.1f}% of peak" if share is not None else "",
        f"error {100 * row['error']:.0f}% of allowed",
    ]
    notes = [row["reason"], f"{row['dropped']} samples dropped" if row["dropped"] else None]
    return cells + [note for note in notes if note]


def summary_text(record: Mapping[str, Any]) -> str:
    """The end of a run: the machine, and how many cases are faster, slower or without comparison."""
    results = record["results"]
    ratios = [r["ratio"] for r in results if r["ratio"] is not None]
    faster, slower = sum(r > 1 + SAME for r in ratios), sum(r < 1 - SAME for r in ratios)
    dropped = sum(row.get("dropped", 0) for r in results for row in r["contenders"])
    counted = sum(len(row.get("samples_ms", ())) for r in results for row in r["contenders"])
    peaks = record["peaks"]
    lines = [
        "",
        f"{record['cpu']}, {record['isa']}, {record['threads']} threads; peaks {peaks['fma']:.0f} GFLOP/s FMA, "
        f"{peaks['dot_bf16']:.0f} GFLOP/s bf16, {peaks['read']:.0f} GB/s read",
        f"{len(results)} cases: {faster} faster than the best peer, {slower} slower, "
        f"{len(ratios) - faster - slower} the same, {len(results) - len(ratios)} without comparison",
        f"{counted} samples counted, {dropped} dropped because the machine's peak moved around them",
    ]
    before = record["load"]["before"]
    if before is not None and before[0] > BUSY * record["cores"]:
        lines.append(
            f"The machine was busy before this run (load {before[0]} on {record['cores']} cores): do not publish"
        )
    lines += [
        f"  slower: {r['op']} {r['case']} {r['dtype']} {r['direction']}: {standing(r)}"
        for r in results
        if r["ratio"] is not None and r["ratio"] < 1 - SAME
    ]
    return "\n".join(lines)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 0 0 1.5em } td, th { padding: .2em .8em; text-align: left }
tr { border-bottom: 1px solid #ddd } .ours { font-weight: 600 } .slower { color: #b00020 } img { max-width: 100% }
"""


def html_report(record: Mapping[str, Any]) -> str:
    """The whole report in one file that loads nothing."""
    title = "gpt4v_fast beside its peers"
    facts = {
        "machine": f"{record['cpu']}, {record['cores']} cores, {record['isa']}, {record['threads']} threads",
        "GPUs": ", ".join(record["gpus"]) or "none",
        "commit": record["commit"] or "an installed package",
        "date": f"{record['date']} to {record.get('finished', '')}",
        "command": record["command"],
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version),
        "load": f"{record['load']['before']} before, {record['load']['after']} after",
        "peaks": ", ".join(f"{name} {value:.0f}" for name, value in record["peaks"].items())
        + " (GFLOP/s, GFLOP/s, GB/s)",
    }
    parts = [f"<h1>{title}</h1>", _table([[name, value] for name, value in facts.items()])]
    parts.append(f"<pre>{html.escape(summary_text(record).strip())}</pre>")
    for op in dict.fromkeys(r["op"] for r in record["results"]):
        results = [r for r in record["results"] if r["op"] == op]
        parts += [f"<h2>{html.escape(op)}</h2>", _plot(op, results), *map(_html_case, results)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _html_case(result: Mapping[str, Any]) -> str:
    shape = " ".join(f"{name}={size}" for name, size in result["shape"].items())
    name = f"{result['case']}, {result['dtype']}, {result['direction']}"
    slower = result["ratio"] is not None and result["ratio"] < 1 - SAME
    verdict_class = ' class="slower"' if slower else ""
    rows = [[row["name"], *_cells(row, result["unit"])] for row in result["contenders"]]
    return (
        f"<h3>{html.escape(name)}</h3><p>{html.escape(shape)}<br>"
        f"<b{verdict_class}>{html.escape(standing(result))}</b></p>"
        + _table(rows, [row["ours"] for row in result["contenders"]])
    )


def _table(rows: Sequence[Sequence[str]], marked: Sequence[bool] | None = None) -> str:
    lines = []
    for i, row in enumerate(rows):
        name = ' class="ours"' if marked and marked[i] else ""
        lines.append(f"<tr{name}>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _plot(op: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Bars of every contender's share of the measured peak, as an image in the page."""
    try:
        import matplotlib
    except ImportError:
        return '<p>No plot: matplotlib is not installed (pip install "gpt4v_fast[demo]").</p>'
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["name"] for r in results for row in r["contenders"]))
    height = 0.8 / max(1, len(names))
    figure = Figure(figsize=(11, 1.2 + 0.25 * len(names) * len(results)), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        bars = [
            (y + i * height, 100 * row["share_of_peak"])
            for y, r in enumerate(results)
            for row in r["contenders"]
            if row["name"] == name and row.get("share_of_peak") is not None
        ]
        axes.barh([y for y, _ in bars], [x for _, x in bars], height=height, label=name)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(results))])
    axes.set_yticklabels([f"{r['case']}\n{r['dtype']} {r['direction']}" for r in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the peak measured beside it")
    axes.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    encoded = base64.b64encode(image.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(op)}: share of peak by case" src="data:image/png;base64,{encoded}">'
