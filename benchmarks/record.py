"""The record of a run (JSON): what a reader needs to repeat or to judge it. Tables and plots are made from it.

It is written after every case, so that a run which was stopped keeps what it measured and can be continued.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpt4v_fast as gf
from gpt4v_fast import doctor

from .registry import Case
from .timing import Measurement, Settings, Timing

SCHEMA = 3  # 3: extra memory; 2: error is in shares of what rounding explains (check.py); 1: of the row's scale
SAME = 0.02  # a difference that is not worth a word
PEERS = ("cut-cross-entropy", "liger-kernel", "openvino", "onnxruntime", "onnx")
# What must be the same where a run is continued: anything else would put different machines or programs side by side.
CONTINUED = (
    "schema", "commit", "cpu", "cores", "gpus", "isa", "threads", "device", "versions", "environment", "settings"
)  # fmt: skip


def new(
    command: str, threads: int, settings: Settings, peaks: Mapping[str, float], device: str = "cpu"
) -> dict[str, Any]:
    """A record without results."""
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


def finish(record: dict[str, Any]) -> None:
    record["finished"] = _now()
    record["load"]["after"] = load()


def text(record: Mapping[str, Any]) -> str:
    """The JSON. Paths of this machine, as commands and messages quote them, are cut to their last parts."""
    return json.dumps(_without_paths(record), indent=1)


def write(record: Mapping[str, Any], path: Path) -> None:
    """In one step: a reader, or a run that is killed, never leaves half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text(record) + "\n", encoding="utf-8")
    os.replace(beside, path)


def read(path: Path) -> dict[str, Any]:
    """The record in that file.

    Raises:
        ValueError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a record of a benchmark, got {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or "results" not in found:
        raise ValueError(f"{path}: expected a record of schema {SCHEMA}, got {str(found)[:40]!r}")
    return found


def continued(record: dict[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with the results of an earlier run under the same conditions.

    Raises:
        ValueError: the conditions differ.
    """
    for name in CONTINUED:
        now, then = (json.loads(text({name: x[name]})) for x in (record, earlier))
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
    record["results"] = [*others, result]


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


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """The median and the ends; none where nothing was measured."""
    if not any(values):
        return None
    ordered = sorted(values)
    return {"median": ordered[len(ordered) // 2], "least": ordered[0], "most": ordered[-1]}


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
        "handoff_ns": _spread(measured.handoffs_ns),
        "point": None if case.point is None else case.point._asdict(),
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
