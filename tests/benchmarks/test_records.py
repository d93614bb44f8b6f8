"""Records as files: a line per case, merged and compared; the page and the picture that are made from them."""

import json
import re
from pathlib import Path

import pytest
from benchmark_cases import right, run_fake, wrong

from gpt4v_fast.benchmarks import command, performance, record

RESULTS = sorted(path for path in performance.RESULTS.glob("*.json") if not path.name.startswith("bits-"))


def made(monkeypatch, date="2026-11-30T10:00:00+00:00", commit="abc", names=("one", "two"), **contenders):
    """A record of made-up cases."""
    new = record.new("bench", 1, command.QUICK, {"fma": 1.0, "dot_bf16": 2.0, "read": 3.0})
    new |= {"date": date, "commit": commit, "complete": True}
    result = run_fake(monkeypatch, **(contenders or {"gpt4v_fast": right, "bad": wrong, "peer": right}))
    for name in names:
        record.put(new, {**result, "case": name})
    return new


def test_a_record_has_a_line_per_case_and_is_read_as_it_was(monkeypatch, tmp_path):
    new, path = made(monkeypatch), tmp_path / "record.json"
    record.write(new, path)
    lines = [line for line in path.read_text().splitlines() if line.startswith('{"op"')]
    assert [json.loads(line.rstrip(","))["case"] for line in lines] == ["one", "two"]
    assert all('"run": "2026-11-30T10:00 abc"' in line and "verdict" not in line for line in lines)
    read = record.read(path)
    assert read["results"][0]["contenders"][1]["status"] == "refused"
    for name in ("best_peer", "sure", "unit"):
        assert read["results"][0][name] == new["results"][0][name]
    assert read["results"][0]["ratio"] == pytest.approx(new["results"][0]["ratio"], rel=1e-3)
    record.write(read, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_a_merged_record_has_the_newest_measurement_of_each_case(monkeypatch, tmp_path):
    old = made(monkeypatch, "2026-11-01T00:00:00+00:00", "aaa")
    new = made(monkeypatch, "2026-11-02T00:00:00+00:00", "bbb", names=("two", "three"))
    for both in (record.merged(old, new), record.merged(new, old)):
        runs = {result["case"]: result["run"] for result in both["results"]}
        old_label, new_label = "2026-11-01T00:00 aaa", "2026-11-02T00:00 bbb"
        assert runs == {"one": old_label, "two": new_label, "three": new_label}
        assert both["commit"] == "bbb" and [head["commit"] for head in both["earlier"]] == ["aaa"]
    last = made(monkeypatch, "2026-11-03T00:00:00+00:00", "ccc", names=("one", "two", "three"))
    assert record.merged(both, last)["earlier"] == []
    with pytest.raises(ValueError, match="the record to merge: expected cpu"):
        record.merged(old, {**new, "cpu": "another"})
    with pytest.raises(ValueError, match="the record to continue: expected one run"):
        record.continued(new, both)


@pytest.mark.parametrize(
    ("old_ms", "new_ms", "slower"),
    [(10.0, 10.2, False), (10.0, 10.4, True), (10.0, 5.0, False), (0.002, 0.0028, False), (0.002, 0.0032, True)],
)
def test_slower_is_by_three_percent_and_a_microsecond(old_ms, new_ms, slower):
    assert record.is_slower(old_ms, new_ms) is slower


def test_records_are_shown_compared_plotted_and_merged_by_one_command(monkeypatch, tmp_path, capsys):
    old, new = made(monkeypatch), made(monkeypatch, "2026-12-01T00:00:00+00:00")
    (ours,) = (row for row in new["results"][0]["contenders"] if row["ours"])
    ours["median_ms"] = 1000.0
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for made_record, path in zip((old, new), paths, strict=True):
        record.write(made_record, path)
    assert record.main(["show", str(paths[0])]) == 0
    assert "attention one fp32 forward" in capsys.readouterr().out
    assert record.main(["compare", *map(str, paths)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"attention/one/fp32/forward .* 1000\.0000 ms .* slower", printed)
    assert "2 cases in both" in printed
    assert record.main(["compare", str(paths[0]), str(paths[0])]) == 0
    assert record.main(["plot", str(paths[0]), str(tmp_path / "page.html")]) == 0
    assert "attention" in (tmp_path / "page.html").read_text()
    assert record.main(["merge", str(paths[1]), str(paths[0])]) == 0
    assert {result["run"] for result in record.read(paths[0])["results"]} == {"2026-12-01T00:00 abc"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_stored_records_are_read_and_written_alike(path):
    found = record.read(path)
    assert record.text(found) + "\n" == path.read_text()
    assert len(path.read_text().splitlines()) < len(found["results"]) + 50
    labels = {record.run_label(run) for run in (found, *found["earlier"])}
    assert {result["run"] for result in found["results"]} == labels
    ids = [record.result_id(result) for result in found["results"]]
    assert ids == sorted(set(ids))
    assert path.stem.startswith(tuple(f"{machine}-" for machine in performance.MACHINES))


def test_the_page_and_the_picture_are_those_of_the_records():
    assert performance.stale() == [], "run python -m benchmarks.performance"


def test_a_changed_record_makes_the_page_stale(monkeypatch, capsys):
    whole = performance.records()
    whole["zen5-loss"]["results"][0]["contenders"][0]["median_ms"] *= 2
    monkeypatch.setattr(performance, "records", lambda: whole)
    assert performance.main(["--check"]) == 1
    assert "performance.md is stale" in capsys.readouterr().out


def test_the_page_lists_every_case_and_every_loss():
    page = Path(performance.PAGE).read_text()
    for of_machine in performance.records().values():
        for result in of_machine["results"]:
            name = f"{result['case']} {result['dtype']} {result['direction']}"
            assert f"| {name} |" in page
            if result["ratio"] is not None and result["ratio"] < 1 - record.SAME:
                assert f"| {result['op']} {name} | {result['best_peer']} |" in page
