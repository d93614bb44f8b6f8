"""What people read of a record: text for the terminal, a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from . import plots
from .record import SAME, beside

FOLLOWS = 0.15  # how far time may be from the share of blocks that a mask leaves
PAGES = 2**20  # extra memory below that is a few pages, and says nothing of growth
NOT_RUN = {"not installed": "not installed", "unavailable": "cannot run"}  # by status, in words
BUSY = 0.5  # load per core before a run above which its times are noise


def standing(result: Mapping[str, Any]) -> str:
    """The verdict, with a word of doubt where few samples counted."""
    unsure = result["ratio"] is not None and not result["sure"]
    return result["verdict"] + (" (unsure: too few samples counted)" if unsure else "")


def is_beaten(result: Mapping[str, Any]) -> bool:
    """Whether a peer is faster by more than is worth a word."""
    return result["ratio"] is not None and result["ratio"] < 1 - SAME


def counts(results: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
    """How many cases are faster than the best peer, the same and slower."""
    ratios = [r["ratio"] for r in results if r["ratio"] is not None]
    faster, slower = sum(ratio > 1 + SAME for ratio in ratios), sum(map(is_beaten, results))
    return faster, len(ratios) - faster - slower, slower


def case_text(result: Mapping[str, Any]) -> str:
    """One case for the terminal: a line per contender and the verdict."""
    shape = " ".join(f"{name}={size}" for name, size in result["shape"].items())
    peak = result["peak"]["median"]
    head = f"{result['op']} {result['case']} {result['dtype']} {result['direction']}  ({shape})"
    if peak is not None:
        head += f"  peak {peak:.0f} {result['unit']}"
    if (apart := result["handoff_ns"]) is not None:
        head += f", cores {apart['median']:.0f} ns apart ({apart['least']:.0f} to {apart['most']:.0f})"
    return "\n".join([head, *(f"  {line}" for line in _rows(result)), f"  => {standing(result)}"])


def _rows(result: Mapping[str, Any]) -> list[str]:
    return [f"{row['name']:<46} {' '.join(_cells(row, result['unit']))}" for row in result["contenders"]]


def _cells(row: Mapping[str, Any], unit: str) -> list[str]:
    memory = [_bytes(row["extra_bytes"])] if row["extra_bytes"] is not None else []
    if row["status"] != "timed":
        return [f"{NOT_RUN.get(row['status'], row['status'])}: {row['reason']}", *memory]
    share = row["share_of_peak"]
    cells = [
        f"{row['median_ms']:10.3f} ms",
        f"({row['p20_ms']:.3f} to {row['p80_ms']:.3f})".ljust(24),
        f"{row['rate']:8.1f} {unit}",
        f"{100 * share:5.1f}% of peak" if share is not None else "",
        f"error {100 * row['error']:.0f}% of allowed",
        *memory,
    ]
    notes = [
        row["setting"],
        row["memory_reason"],
        row["reason"],
        f"{row['dropped']} samples dropped" if row["dropped"] else None,
        "one sample" if row["samples"] == 1 else None,
    ]
    return cells + [note for note in notes if note]


def _bytes(extra: int) -> str:
    return f"{extra / 2**20:.1f} MiB extra"


def _missing(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Peers that no case could run, with the kind of reason and the reason."""
    rows = [row for r in results for row in r["contenders"]]
    ran = {row["name"] for row in rows if row["status"] not in NOT_RUN}
    return {row["name"]: f"{NOT_RUN[row['status']]}: {row['reason']}" for row in rows if row["name"] not in ran}


def summary_text(record: Mapping[str, Any]) -> str:
    """The end of a run: the machine, and how many cases are faster, slower or without comparison."""
    results = record["results"]
    faster, same, slower = counts(results)
    dropped = sum(row["dropped"] for r in results for row in r["contenders"])
    counted = sum(row["samples"] for r in results for row in r["contenders"])
    peaks = record["peaks"]
    runs = [record, *record.get("earlier", ())]
    lines = [
        "",
        *(f"run of {head['date'][:16]} at {head['commit']}: {head['command']}" for head in runs),
        f"{_machine(record)}; peaks {peaks['fma']:.0f} GFLOP/s {'fp32' if _on_gpu(record) else 'FMA'}, "
        f"{peaks['dot_bf16']:.0f} GFLOP/s bf16, {peaks['read']:.0f} GB/s {'copy' if _on_gpu(record) else 'read'}",
        f"{len(results)} cases: {faster} faster than the best peer, {slower} slower, "
        f"{same} the same, {len(results) - faster - same - slower} without comparison",
        f"{counted} samples counted, {dropped} dropped because the machine's peak moved around them",
    ]
    lines += [f"  {name}: {reason}" for name, reason in _missing(results).items()]
    if beside(record):
        lines.append(f"{beside(record)} busy processes ran beside it: times of a shared machine, every sample counted")
    before = record["load"]["before"]
    if before is not None and before[0] > BUSY * record["cores"] and not _on_gpu(record):
        lines.append(
            f"The machine was busy before this run (load {before[0]} on {record['cores']} cores): do not publish"
        )
    lines += [
        f"  slower: {r['op']} {r['case']} {r['dtype']} {r['direction']}: {standing(r)}" for r in results if is_beaten(r)
    ]
    lines += [f"  {line}" for line in [*memory_lines(results), *curve_lines(results)]]
    return "\n".join(lines)


def _on_gpu(record: Mapping[str, Any]) -> bool:
    return bool(record["device"] == "cuda")


def _machine(record: Mapping[str, Any]) -> str:
    if _on_gpu(record):
        return str(record["gpus"][0])
    return f"{record['cpu']}, {record['isa']}, {record['threads']} threads"


def memory_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Our largest extra memory beside the logits that linear losses do not write, and the least ratio of the two."""
    found = [
        (row["extra_bytes"], 4 * r["shape"]["N"] * r["shape"]["V"])
        for r in results
        if r["op"] == "linear_cross_entropy"
        for row in r["contenders"]
        if row["ours"] and row["extra_bytes"] is not None
    ]
    if not found:
        return []
    least = min(logits / max(extra, 1) for extra, logits in found)
    most = _bytes(max(found)[0])
    return [f"linear_cross_entropy: at most {most} memory; logits in fp32 are at least {least:.3g} times it"]


def curve_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the curves say of our own contender, a line or two each."""
    lines = []
    for title, points in plots.curves(results).items():
        ours = [(p, row) for p in points for row in p["contenders"] if row["ours"]]
        timed = [(p, row) for p, row in ours if row["status"] == "timed"]
        if len(timed) > 1 and timed[-1][0] is points[-1] and points[-1]["point"]["proportional"]:
            lines.append(f"{title}: {_proportion(timed)}")
        known = [(p["point"]["x"], row["extra_bytes"]) for p, row in ours if row["extra_bytes"] is not None]
        if len(known) > 1:
            (x, least), (last_x, most) = known[0], known[-1]
            text = f"{title}: {_bytes(least)} memory at {x:g} to {_bytes(most)} at {last_x:g}"
            steps = [(b / max(a, 1)) / (x_b / x_a) for (x_a, a), (x_b, b) in pairwise(known) if b > PAGES]
            if steps:
                name = points[0]["point"]["x_name"]
                text += f"; from a point to the next it grows at most {max(steps):.2f} times as much as {name}"
            lines.append(text)
    return lines


def _proportion(ours: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """How far times are from x times the time at the largest x."""
    largest, whole = ours[-1][0]["point"]["x"], ours[-1][1]["median_ms"]
    off = {p["point"]["x"]: row["median_ms"] / whole / (p["point"]["x"] / largest) - 1 for p, row in ours[:-1]}
    outside = ", ".join(f"{100 * x:.0f}% ({100 * value:+.0f}%)" for x, value in off.items() if abs(value) > FOLLOWS)
    inside = sum(abs(value) <= FOLLOWS for value in off.values())
    text = f"time follows the blocks that are left within {100 * FOLLOWS:.0f}% at {inside} of {len(off)} points"
    return text + (f"; not at {outside}" if outside else "")


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
        "beside": f"{beside(record)} busy processes",
        "load": f"{record['load']['before']} before, {record['load']['after']} after",
        "peaks": ", ".join(f"{name} {value:.0f}" for name, value in record["peaks"].items())
        + " (GFLOP/s, GFLOP/s, GB/s)",
    }
    parts = [f"<h1>{title}</h1>", _table([[name, value] for name, value in facts.items()])]
    parts.append(f"<pre>{html.escape(summary_text(record).strip())}</pre>")
    for op in dict.fromkeys(r["op"] for r in record["results"]):
        results = [r for r in record["results"] if r["op"] == op]
        parts += [f"<h2>{html.escape(op)}</h2>", *plots.html_images(op, results), *map(_html_case, results)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _html_case(result: Mapping[str, Any]) -> str:
    shape = " ".join(f"{name}={size}" for name, size in result["shape"].items())
    name = f"{result['case']}, {result['dtype']}, {result['direction']}"
    verdict_class = ' class="slower"' if is_beaten(result) else ""
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
