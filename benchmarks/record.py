"""The record of runs (JSON): what a reader needs to repeat or to judge them. Tables and plots are made from it.

    python -m benchmarks.record show FILE          every case, its contenders and our standing
    python -m benchmarks.record compare OLD NEW    our time in both, the cases that are slower, exit code 1 where one is
    python -m benchmarks.record plot FILE PAGE     the tables and pictures as one HTML page
    python -m benchmarks.record merge NEW FILE     puts the newest measurement of each case into FILE

A record holds a line for each fact about its newest run, for each earlier run whose cases it still holds, and for each
case. What follows from other numbers (rates, shares, verdicts) is left out of the file and filled in by `read`. A run
writes its record after every case, so that a run which was stopped keeps what it measured and can be continued.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpt4v_fast as gf
from gpt4v_fast import doctor

from .peaks import UNITS
from .registry import Case
from .timing import Measurement, Settings, Timing

SCHEMA = 4  # 4: a line per case, several runs; 3: extra memory; 2: error is in shares of what is allowed (check.py)
SAME = 0.02  # a difference that is not worth a word
# How much slower a case may be before `compare` calls it slower: a share of its time, and milliseconds.
SLOWER, SLOWER_MS = 0.03, 0.001
DIGITS = 5  # significant ones of a measured number in the file
PEERS = ("cut-cross-entropy", "liger-kernel", "openvino", "onnxruntime", "onnx")
# What must be the same where a run is continued: anything else would put different machines or programs side by side.
CONTINUED = (
    "schema", "commit", "cpu", "cores", "gpus", "isa", "threads", "device", "versions", "environment", "settings",
    "beside",
)  # fmt: skip
MACHINE = ("schema", "cpu", "gpus", "device", "beside")  # what the runs of one file have in common


def new(
    command: str, threads: int, settings: Settings, peaks: Mapping[str, float], device: str = "cpu", beside: int = 0
) -> dict[str, Any]:
    """A record without results. beside: the busy processes beside every measurement."""
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
        "device": device,
        "beside": beside,
        "versions": {"gpt4v_fast": gf.__version__, **doctor.versions(), **_peer_versions()},
        "environment": doctor.environment(),
        "load": {"before": load(), "after": None},
        "settings": asdict(settings),
        "peaks": dict(peaks),
        "complete": False,
        "results": [],
    }


def _peer_versions() -> dict[str, str | None]:
    """Of the peers that are no dependencies; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def beside(head: Mapping[str, Any]) -> int:
    """The busy processes beside a run: its numbers stand for a shared machine. Old records do not have the field."""
    return int(head.get("beside", 0))


def finish(record: dict[str, Any]) -> None:
    record["finished"] = _now()
    record["load"]["after"] = load()


def run_label(head: Mapping[str, Any]) -> str:
    """What a case's line says of the run that it is of: when it began, and the commit."""
    return f"{head['date'][:16]} {head['commit'] or 'installed'}"


def text(record: Mapping[str, Any]) -> str:
    """The file: a line per fact, earlier run and case. Paths of this machine, as commands and messages quote them, are
    cut to their last parts."""
    fields = []
    for name, value in _without_paths(record).items():
        if name == "results":
            value = [_packed(result) for result in value]
        if name in ("results", "earlier"):
            rows = ",\n".join(json.dumps(row) for row in value)
            fields.append(f'"{name}": [\n{rows}\n]')
        else:
            fields.append(f"{json.dumps(name)}: {json.dumps(_short(value))}")
    return "{\n" + ",\n".join(fields) + "\n}"


def write(record: Mapping[str, Any], path: Path) -> None:
    """In one step: a reader, or a run that is killed, never leaves half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text(record) + "\n", encoding="utf-8")
    os.replace(beside, path)


def read(path: Path) -> dict[str, Any]:
    """The record in that file, with everything that follows from its numbers.

    Raises:
        ValueError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a record of a benchmark, got {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or "results" not in found:
        raise ValueError(f"{path}: expected a record of schema {SCHEMA}, got {str(found)[:40]!r}")
    found["results"] = [_unpacked(result) for result in found["results"]]
    return found


# A row's fields in the order of the file, with the values that are left out of it.
ROW: dict[str, Any] = {
    "name": None, "ours": False, "status": "timed", "reason": None, "median_ms": None, "p20_ms": None, "p80_ms": None,
    "samples": 0, "dropped": 0, "calls_per_sample": None, "error": None, "extra_bytes": None, "memory_reason": None,
    "one_call_s": None, "setting": None,
}  # fmt: skip
DERIVED = ("unit", "best_peer", "ratio", "sure", "verdict")


def _packed(result: Mapping[str, Any]) -> dict[str, Any]:
    """A case's line: what was measured, without what is absent or follows."""
    rows = [
        {name: _short(row[name]) for name, absent in ROW.items() if row.get(name, absent) != absent}
        for row in result["contenders"]
    ]
    kept = {name: value for name, value in result.items() if name not in DERIVED and value is not None}
    return {**kept, "peak": _short(result["peak"]), "contenders": rows}


def _short(value: Any) -> Any:
    """Measured numbers to as many digits as they are good for."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return {name: _short(x) for name, x in value.items()} if isinstance(value, dict) else value


def _unpacked(result: Mapping[str, Any]) -> dict[str, Any]:
    rows = [{**ROW, **row} for row in result["contenders"]]
    work, peak = 1e-9 * result["bytes" if result["bound"] == "read" else "flops"], result["peak"]["median"]
    for row in rows:
        rate = work / (1e-3 * row["median_ms"]) if row["median_ms"] else None
        row |= {"rate": rate, "share_of_peak": None if rate is None or not peak else rate / peak}
    whole = {"handoff_ns": None, "point": None, **result, "unit": UNITS[result["bound"]], "contenders": rows}
    return whole | standing(rows)


def standing(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Our standing against the fastest peer."""
    timed = [row for row in rows if row["status"] == "timed" and row["median_ms"]]
    ours = min((row["median_ms"] for row in timed if row["ours"]), default=None)
    best = min((row for row in timed if not row["ours"]), key=lambda row: row["median_ms"], default=None)
    compared = [row for row in timed if row is best or (row["ours"] and row["median_ms"] == ours)]
    single = best is not None and ours is not None and any(row["samples"] == 1 for row in compared)
    ratio = best["median_ms"] / ours if best and ours and not single else None
    return {
        "best_peer": best["name"] if best else None,
        "ratio": ratio,
        # A row with a time and a reason has too few samples.
        "sure": ratio is not None and not any(row["reason"] for row in timed if row["ours"] or row is best),
        "verdict": "no comparison: one sample" if single else verdict(ratio, best["name"] if best else None),
    }


def merged(stored: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both records' cases, the newer measurement of each; runs of which no case is left are dropped.

    Raises:
        ValueError: they are of different machines.
    """
    for name in MACHINE:
        if stored.get(name, 0) != new.get(name, 0):
            raise ValueError(f"the record to merge: expected {name} {stored.get(name, 0)!r}, got {new.get(name, 0)!r}")
    cases = {result_id(result): result for result in stored["results"]}
    for result in new["results"]:
        known = cases.get(result_id(result))
        if known is None or result["run"] >= known["run"]:
            cases[result_id(result)] = result
    heads = {run_label(head): head for record in (stored, new) for head in (*record.get("earlier", ()), _head(record))}
    used = sorted({result["run"] for result in cases.values()}, reverse=True)
    newest, *earlier = (heads[label] for label in used)
    return {**newest, "earlier": earlier, "results": sorted(cases.values(), key=result_id)}


def _head(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("earlier", "results")}


def continued(record: dict[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with the results of an earlier run under the same conditions.

    Raises:
        ValueError: the conditions differ.
    """
    if earlier.get("earlier"):
        raise ValueError("the record to continue: expected one run, got one of several")
    for name in CONTINUED:
        now, then = (json.loads(text({name: x.get(name, 0)})) for x in (record, earlier))
        if now != then:
            raise ValueError(f"the record to continue: expected {name} {now[name]}, got {then[name]}")
    return {**record, "date": earlier["date"], "results": list(earlier["results"])}


def settled(result: Mapping[str, Any]) -> bool:
    """Whether every contender that was timed has all its samples; others are worth another try."""
    rows = result["contenders"]
    return all(row["status"] != "noisy" and not (row["status"] == "timed" and row["reason"]) for row in rows)


def put(record: dict[str, Any], result: dict[str, Any]) -> None:
    """Adds a result, in place of an earlier one of the same case."""
    others = [other for other in record["results"] if result_id(other) != result_id(result)]
    record["results"] = [*others, {**result, "run": run_label(record)}]


def result_id(result: Mapping[str, Any]) -> str:
    """The `Case.id` it is of."""
    return "/".join(result[name] for name in ("op", "case", "dtype", "direction"))


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


def _without_paths(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub(r"(?<![\w.)/])/(?:[^\s/:'\"]+/)+", "", value)
    if isinstance(value, Mapping):
        return {name: _without_paths(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(x) for x in value]
    return value


def timing_fields(timing: Timing) -> dict[str, Any]:
    """What a contender's row says of its time."""
    return {
        "median_ms": _ms(timing.median_s),
        "p20_ms": _ms(timing.quantile_s(0.2)),
        "p80_ms": _ms(timing.quantile_s(0.8)),
        "samples": len(timing.samples_s),
        "dropped": timing.dropped,
        "calls_per_sample": timing.calls_per_sample,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 6)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """The median and the ends; none where nothing was measured."""
    if not any(values):
        return None
    ordered = sorted(values)
    return {"median": ordered[len(ordered) // 2], "least": ordered[0], "most": ordered[-1]}


def result(case: Case, measured: Measurement, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A case's part of the record."""
    probes = measured.probes
    found = {
        "op": case.op,
        "case": case.name,
        "dtype": case.dtype_name,
        "direction": case.direction,
        "shape": dict(case.shape),
        "flops": case.flops,
        "bytes": case.bytes,
        "bound": case.bound,
        "peak": {"median": measured.peak, "least": min(probes, default=None), "most": max(probes, default=None)},
        "handoff_ns": _spread(measured.handoffs_ns),
        "point": None if case.point is None else case.point._asdict(),
        "contenders": list(rows),
    }
    return _unpacked(found)


def verdict(ratio: float | None, peer: str | None) -> str:
    """Our standing in words; `ratio` is the best peer's time over ours."""
    if ratio is None:
        return "no comparison"
    if abs(ratio - 1.0) <= SAME:
        return f"as fast as {peer}"
    return f"{ratio:.2f}x faster than {peer}" if ratio > 1 else f"slower than {peer}: {1 / ratio:.2f}x its time"


def compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Our milliseconds in both records, of every case that both have a time of."""
    before, after = ({result_id(r): _our_ms(r) for r in record["results"]} for record in (old, new))
    pairs = [(name, before.get(name), ms) for name, ms in after.items()]
    return [(name, old_ms, new_ms) for name, old_ms, new_ms in pairs if old_ms and new_ms]


def _our_ms(result: Mapping[str, Any]) -> float | None:
    return min((row["median_ms"] for row in result["contenders"] if row["ours"] and row["median_ms"]), default=None)


def is_slower(old_ms: float, new_ms: float) -> bool:
    return new_ms - old_ms > max(SLOWER * old_ms, SLOWER_MS)


def main(argv: Sequence[str] | None = None) -> int:
    from . import report

    parser = argparse.ArgumentParser(description="Prints, compares, plots and merges records of benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, files in (("show", 1), ("compare", 2), ("plot", 2), ("merge", 2)):
        commands.add_parser(name).add_argument("files", nargs=files, type=Path)
    args = parser.parse_args(argv)
    first = read(args.files[0])
    if args.command == "show":
        print("\n".join([*map(report.case_text, first["results"]), report.summary_text(first)]))
    elif args.command == "plot":
        args.files[1].write_text(report.html_report(first), encoding="utf-8")
    elif args.command == "merge":
        write(merged(read(args.files[1]), first) if args.files[1].exists() else first, args.files[1])
    else:
        second = read(args.files[1])
        if beside(first) != beside(second):
            print(f"busy processes beside the runs: {beside(first)} -> {beside(second)}; not the kernels alone differ")
        pairs = compared(first, second)
        for name, old_ms, new_ms in pairs:
            word = "  slower" if is_slower(old_ms, new_ms) else ""
            print(f"{name:<70} {old_ms:10.4f} -> {new_ms:10.4f} ms  {new_ms / old_ms:5.2f}x{word}")
        slower = sum(is_slower(old_ms, new_ms) for _, old_ms, new_ms in pairs)
        print(f"{len(pairs)} cases in both, {slower} slower by over {100 * SLOWER:.0f}% and {1e3 * SLOWER_MS:.0f} us")
        return 1 if slower else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
