"""Whole benchmarks on the tiny model: what runs, what is kept, how it goes on, and what is written."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from plotly.offline import get_plotlyjs

from tests.bench.test_bench_stream import put
from treering import Workspace
from treering.bench import outputs, runs, tuning
from treering.bench.code import code_digest
from treering.bench.entries import parse
from treering.bench.quality import Bench, run_quality
from treering.bench.stream import Stream
from treering.errors import TreeringError, UsageError
from treering.testing import toy_rows

SETTINGS = ("bf16=false", "learning_rate=0.01", "per_device_train_batch_size=8", "eval.max_new_tokens=8")


class InProcess:
    """Stands in for `multiprocessing.get_context`: a fresh process costs seconds."""

    exitcode = 0

    def __init__(self, method: str = "spawn") -> None:
        pass

    def Process(self, target: Any, args: Any) -> InProcess:  # noqa: N802
        try:
            target(*args)
        except SystemExit as end:
            self.exitcode = int(str(end.code))
        return self

    def start(self) -> None:
        pass

    def join(self, timeout: float | None = None) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treering.bench.runs.multiprocessing.get_context", InProcess)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for task in ("pens", "cups"):
        put(tmp_path / "data" / task / "train.jsonl", toy_rows(task, 24))
        put(tmp_path / "data" / task / "test.jsonl", toy_rows(task, 32)[24:])
    return tmp_path / "data"


@pytest.fixture
def bench(data: Path, model_folder: Path) -> Callable[..., Bench]:
    def make(*overrides: str, rows: int | None = 16, **given: Any) -> Bench:
        given = {"epochs": 1, "model": str(model_folder), **given}
        return Bench(Stream(data, rows=rows), overrides=(*SETTINGS, *overrides), **given)

    return make


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The workspaces that were updated, one entry an update."""
    found: list[str] = []
    real = Workspace.update

    def counted(ws: Workspace, *arguments: Any, **settings: Any) -> Any:
        found.append(ws.root.name)
        return real(ws, *arguments, **settings)

    monkeypatch.setattr(Workspace, "update", counted)
    return found


@pytest.mark.usefixtures("in_process")
def test_exactly_the_methods_named_run_with_every_seed_and_order(
    bench: Callable[..., Bench], updates: list[str], tmp_path: Path
) -> None:
    twice = bench(seeds=(1, 2), orders=2, baseline="naive")
    found = run_quality(twice, parse("replay,naive,joint"), tmp_path / "work")
    assert list(found["methods"]) == ["replay", "naive", "joint"]
    # Two updates for each seed and order; all tasks at once have no order.
    assert len(updates) == 2 * 2 * 2 + 2 * 2 * 2 + 2 and len(list((tmp_path / "work").iterdir())) == 4 + 4 + 2
    for method in found["methods"].values():
        assert [(run["seed"], run["order"]) for run in method["runs"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    replay, naive, joint = found["methods"].values()
    assert [run["tasks"] for run in naive["runs"][:2]] == [["cups", "pens"], ["pens", "cups"]]
    assert naive["against"] is None and set(replay["against"]) == {"average_accuracy", "new", "old"}
    assert replay["measures"]["average_accuracy"]["spread"] is not None and replay["measures"]["fwt"]["mean"] is None
    # Costs.
    assert joint["cost"]["rows_trained"] == 32 == naive["cost"]["rows_trained"] < replay["cost"]["rows_trained"]
    assert replay["cost"]["stored_bytes"] > naive["cost"]["stored_bytes"] > 0
    assert all(method["cost"]["seconds"] > 0 and method["cost"]["peak_memory_mb"] > 0 for method in (replay, naive))
    assert (naive["cost"]["memory_rows"], replay["cost"]["memory_rows"] > 0) == (0, True)
    # The measures are those of the matrix.
    one = naive["runs"][0]
    assert one["average_accuracy"] == pytest.approx(sum(one["matrix"][-1]) / 2)
    assert one["old"] == one["matrix"][-1][0]
    # A method that is added runs alone; the others are read back.
    before = len(updates)
    again = run_quality(twice, parse("replay,naive,joint,untouched"), tmp_path / "work")
    assert len(updates) == before
    assert again["methods"]["replay"]["runs"][0]["matrix"] == replay["runs"][0]["matrix"]
    assert again["methods"]["replay"]["measures"]["fwt"]["mean"] is not None
    assert again["methods"]["untouched"]["cost"]["rows_trained"] == 0


@pytest.mark.usefixtures("in_process")
def test_a_run_is_what_it_depends_on(bench: Callable[..., Bench], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(one: Bench, name: str = "naive", seed: int = 1) -> str:
        (entry,) = parse(name)
        return runs.Job.of(entry.name, entry.kind, one.settings(entry, seed), one.stream.draw(seed)).digest

    first = digest(bench())
    assert digest(bench()) == first
    # What it does not use does not count: other methods' settings, its name, who is told of it.
    assert digest(bench("lwf.weight=1", "report_to=tensorboard")) == first == digest(bench(), "naive:lwf.weight=3")
    changed = [
        digest(bench(), seed=2),
        digest(bench("lora_rank=4")),
        digest(bench(rows=12)),
        digest(bench(), "replay"),
        digest(bench(), "joint"),
        digest(bench(), "naive:learning_rate=0.02"),
    ]
    monkeypatch.setattr(runs, "code_digest", lambda config: code_digest(config) + "changed")
    changed.append(digest(bench()))
    monkeypatch.undo()
    put(data / "pens" / "test.jsonl", toy_rows("pens", 30)[24:])
    changed.append(digest(bench()))
    assert len({first, *changed}) == 1 + len(changed)


@pytest.mark.usefixtures("in_process")
def test_it_resumes_with_the_update_it_was_in(
    bench: Callable[..., Bench], updates: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_quality(bench(), parse("naive,replay"), tmp_path / "whole")
    updates.clear()
    counted = Workspace.update

    def broken(ws: Workspace, *arguments: Any, **settings: Any) -> Any:
        if len(updates) == 1:
            raise TreeringError("the power went")
        return counted(ws, *arguments, **settings)

    monkeypatch.setattr(Workspace, "update", broken)
    with pytest.raises(TreeringError, match="method naive ended with exit code 1"):
        run_quality(bench(), parse("naive,replay"), tmp_path / "work")
    monkeypatch.setattr(Workspace, "update", counted)
    found = run_quality(bench(), parse("naive,replay"), tmp_path / "work")
    assert len(updates) == 4  # Each update once.
    for name in ("naive", "replay"):
        assert found["methods"][name]["runs"][0]["matrix"] == whole["methods"][name]["runs"][0]["matrix"]
    # What is kept is small: no workspace stays.
    assert not list((tmp_path / "work").rglob("*.safetensors"))


def left(orphans: Sequence[psutil.Process]) -> None:
    """Wait until none of them runs any more."""
    for _ in range(600):
        if not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in orphans):
            return
        time.sleep(0.1)
    raise AssertionError("the orphan runs on")


def test_after_a_kill_it_goes_on(bench: Callable[..., Bench], tmp_path: Path, updates: list[str], data: Path) -> None:
    """Killed with -9 in the middle; the orphan ends too, and what was done is not done again."""
    for task in ("bags", "hats", "mugs", "socks"):
        put(data / task / "train.jsonl", toy_rows(task, 24))
        put(data / task / "test.jsonl", toy_rows(task, 32)[24:])
    one = bench()
    assert one.model is not None
    options = ["--data", data, "--model", one.model, "--methods", "naive", "--rows", 16, "--seeds", 42, "--epochs", 1]
    command = [Path(sys.executable).with_name("treering"), "bench", "quality", *SETTINGS, *options]
    work = tmp_path / "work"
    started = subprocess.Popen(
        [*map(str, command), "--work", str(work)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 400
    while not list(work.glob("*/ws/versions/v2")) and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.02)
    orphans = psutil.Process(started.pid).children()
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    kept = len(list(work.glob("*/ws/versions/v*")))
    assert 2 <= kept < 6, started.stderr.read() if started.stderr else ""
    assert orphans
    left(orphans)
    kept = len(list(work.glob("*/ws/versions/v*")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treering.bench.runs.multiprocessing.get_context", InProcess)
        found = run_quality(one, parse("naive"), work)
    assert len(updates) == 6 - kept < 6
    assert len(found["methods"]["naive"]["runs"][0]["matrix"]) == 6


@pytest.mark.usefixtures("in_process")
def test_a_tuned_baseline_takes_the_better_rate_and_sees_no_test_row(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "FACTORS", (0.02, 8.0))  # Of 1.5e-3: one that learns nothing, one that learns.
    one = bench(epochs=4, rows=None)
    found = run_quality(one, parse("naive-tuned,naive:learning_rate=1e-5"), tmp_path / "work")
    tuned, slow = found["methods"].values()
    assert tuned["tuning"]["rate"] == 1.2e-2 and tuned["tuning"]["edge"]
    assert [one["rate"] for one in tuned["tuning"]["tried"]] == [3e-5, 1.2e-2]
    assert tuned["tuning"]["tried"][0]["loss"] > tuned["tuning"]["tried"][1]["loss"]
    assert tuned["measures"]["new"]["mean"] > slow["measures"]["new"]["mean"]
    # What the search took is counted apart: two rates, two tasks, four fifths of the rows, four epochs.
    assert tuned["tuning"]["rows_trained"] == 2 * 2 * 19 * 4 and tuned["cost"]["rows_trained"] == 2 * 24 * 4
    draw = one.stream.draw(42)
    small = tuning.held_back(draw)
    test = {row.id for rows in draw.test.values() for row in rows}
    judged, learned = ({row.id for rows in side.values() for row in rows} for side in (small.test, small.taught))
    assert not judged & test and not judged & learned and len(judged) == 10 and not learned & test


@pytest.mark.usefixtures("in_process")
def test_a_rate_that_fails_is_out(bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runs.run_all

    def fails(jobs: Any, work: Path) -> Any:
        if jobs[0].settings["learning_rate"] > bad:
            raise TreeringError("the loss ran away")
        return real(jobs, work)

    monkeypatch.setattr(tuning, "run_all", fails)
    monkeypatch.setattr(tuning, "FACTORS", (2.0, 8.0))
    bad, draw = 4e-3, bench().stream.draw(42)
    (entry,) = parse("naive-tuned")
    assert tuning.tune(entry, draw, lambda one: bench().settings(one, 42), tmp_path)["rate"] == 3e-3
    bad = 0.0
    with pytest.raises(TreeringError, match="failed at every rate"):
        tuning.tune(entry, draw, lambda one: bench().settings(one, 42), tmp_path)


@pytest.mark.usefixtures("in_process")
def test_the_oracle_forgets_nothing_and_keeps_an_adapter_a_task(bench: Callable[..., Bench], tmp_path: Path) -> None:
    found = run_quality(bench(orders=2), parse("oracle,naive"), tmp_path / "work")
    oracle, naive = found["methods"].values()
    assert oracle["measures"]["old"]["mean"] is not None and len(oracle["runs"][0]["matrix"]) == 1
    assert oracle["cost"]["stored_bytes"] == pytest.approx(2 * naive["cost"]["stored_bytes"], rel=0.1)
    assert oracle["cost"]["rows_trained"] == naive["cost"]["rows_trained"]
    # The first task of an order is learned by both from the same base: the same score.
    order = naive["runs"][0]["tasks"]
    assert (
        dict(zip(oracle["runs"][0]["tasks"], oracle["runs"][0]["matrix"][0], strict=True))[order[0]]
        == (naive["runs"][0]["matrix"][0][0])
    )


@pytest.mark.usefixtures("in_process")
def test_tasks_that_return(bench: Callable[..., Bench], data: Path, tmp_path: Path) -> None:
    (data / "pens" / "train.jsonl").rename(data / "pens" / "train-1.jsonl")
    put(data / "pens" / "train-3.jsonl", toy_rows("pens", 48)[32:])
    (data / "cups" / "train.jsonl").rename(data / "cups" / "train-2.jsonl")
    one = run_quality(bench(), parse("naive"), tmp_path / "work")["methods"]["naive"]["runs"][0]
    assert (one["tasks"], one["learned"], len(one["matrix"])) == (["pens", "cups"], [0, 1], 3)
    assert one["cost"]["rows_trained"] == 48 and None not in one["matrix"][2]


@pytest.mark.usefixtures("in_process")
def test_general_ability_is_measured_before_and_after_each_method(bench: Callable[..., Bench], tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("some words\n\nand a few more of them\n")
    one = bench("learning_rate=0.05", general=tmp_path / "general.txt")
    found = run_quality(one, parse("naive,full"), tmp_path / "work")
    before, after = found["general"], found["methods"]["naive"]["general"]
    assert 0 <= before["questions"] <= 1 and before["perplexity"] > 1 and before["perplexity"] != after["perplexity"]
    assert found["methods"]["full"]["general"]["perplexity"] != after["perplexity"]
    header = outputs.header(found)
    assert "perplexity" in header and "questions" in header
    assert any(note.startswith("before: perplexity") for note in outputs.notes(found))
    with pytest.raises(UsageError, match="is no file"):
        run_quality(bench(general=tmp_path / "none.txt"), parse("naive"))


@pytest.mark.usefixtures("in_process")
def test_what_is_written(bench: Callable[..., Bench], tmp_path: Path) -> None:
    one = bench(seeds=(1, 2), baseline="naive")
    found = run_quality(one, parse("naive,treering:distill.weight=1,untouched"), tmp_path / "work")
    out = tmp_path / "out"
    outputs.write_all(found, out)
    assert json.loads((out / "results.json").read_text()) == found
    names = sorted(path.name for path in (out / "matrices").iterdir())
    assert len(names) == 6 and names[0] == "00-naive-seed1-order0.csv"
    rows = list(csv.reader((out / "matrices" / names[0]).open()))
    assert rows[0] == ["update", *found["methods"]["naive"]["runs"][0]["tasks"]] and len(rows) == 3
    assert [float(cell) for cell in rows[2][1:]] == found["methods"]["naive"]["runs"][0]["matrix"][1]
    lines = (out / "table.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [line[0] for line in table] == ["method", "---", *found["methods"]]
    assert {len(line) for line in table} == {len(outputs.header(found))}
    verdict = found["methods"]["treering:distill.weight=1"]["against"]["average_accuracy"]["verdict"]
    assert table[3][table[0].index("against naive")].endswith(verdict)
    assert table[4][table[0].index("new")] == "-" and table[4][table[0].index("rows trained")] == "0"
    page = (out / "pareto.html").read_text()
    points = json.loads(re.findall(r'id="points">(.*?)</script>', page, re.S)[0])
    assert [point["name"] for point in points] == ["naive", "treering:distill.weight=1"]  # The other has no new tasks.
    assert any(point["front"] for point in points) and "rows trained" in points[0]["costs"]
    assert "script-src 'sha256-" in page and not re.search(r'(src|href)="https?:', page.replace(get_plotlyjs(), ""))
    with pytest.raises(UsageError, match="--baseline joint is none of the methods"):
        run_quality(bench(baseline="joint"), parse("naive"))
