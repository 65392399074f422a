"""The report: what it says, that nothing breaks out of it, that it needs no network."""

from __future__ import annotations

import json
import math
import random
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from treering import gate, report
from treering.config import Config
from treering.metrics import Matrix, negative_flips
from treering.results import Result, task_scores

TASKS = ("cards", "transfers", "refunds & returns", "free_form_answers")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(\"2\")'>{{ 7 * 7 }}&amp;"


def results(rates: Mapping[str, float], rows: int, seed: int) -> list[Result]:
    """Scores of `rows` rows a task, right at the rate given; a row that a lower rate gets right, a higher one does."""
    draws = {task: random.Random(f"{task}") for task in rates}
    noise = random.Random(seed)
    return [
        Result(
            id=f"{task}-{number}",
            task=task,
            metric="token_f1" if task == TASKS[3] else "exact_match",
            score=float(draws[task].random() + noise.gauss(0, 0.02) < rate),
            loss=1.8 * (1 - rate) + noise.random() / 10,
            prediction="",
        )
        for task, rate in rates.items()
        for number in range(rows)
    ]


def training_log(steps: int) -> list[dict[str, float]]:
    noise = random.Random(0)
    log = []
    for step in range(1, steps + 1):
        share = step / steps
        entry = {"step": step, "loss": 2.1 * math.exp(-4 * share) + 0.15 + noise.random() / 12}
        if step > 3:
            entry["distill"] = 0.3 * math.exp(-2 * share) + noise.random() / 25
        log.append(
            {
                **entry,
                "lr": min(step / 12, 0.5 + 0.5 * math.cos(3.1 * share)) / 1000,
                "tokens_per_second": noise.gauss(9100, 260),
            }
        )
    return log


def make_manifest(
    tasks: Sequence[str], rates: Sequence[Mapping[str, float]], parent: str | None, rows: int = 160
) -> dict[str, Any]:
    """The manifest of the last update; `rates[i]` holds the share of right answers by task after update i."""
    config = Config()
    matrix = Matrix([], [], [])
    before = results(dict.fromkeys(rates[0], 0.05), rows, 0)
    for number, found in enumerate(rates):
        if number:
            before = results({**dict.fromkeys(found, 0.05), **rates[number - 1]}, rows, number)
        after = results(found, rows, number + 1)
        before_scores, scores = task_scores(before), task_scores(after)
        matrix = matrix.extended(
            {task: each["score"] for task, each in before_scores.items()},
            {task: each["score"] for task, each in scores.items()},
            found,
        )
    learned_now = [task for task, update in zip(matrix.tasks, matrix.learned, strict=True) if update == len(rates) - 1]
    old = [task for task in matrix.tasks if task not in learned_now]
    fresh = {result.id for result in after if result.task in learned_now}
    flips = negative_flips(
        {r.id: r.score for r in before if r.task in old}, {r.id: r.score for r in after if r.task in old}
    )
    verdict = gate.judge(before, after, old, fresh, config.gate, 42)
    return {
        "created": "2025-11-22T00:17:42+00:00",
        "parent": parent,
        "base": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "sha256": "5af571cb" * 8},
        "plan": "d1" * 32,
        "config": config.model_dump(mode="json"),
        "choices": {
            "learning_rate": {"value": 0.001, "reason": "default for lora"},
            "precision": {"value": "float32", "reason": "the processor lacks bfloat16 in hardware"},
            "memory": {"value": 84, "reason": "size auto, balanced"},
            f"metric of {tasks[-1]}": {"value": "token_f1", "reason": "answers are no small label set"},
        },
        "machine": {
            "threads": 2,
            "cpu": "AVX2",
            "precision": "float32",
            "device": "cpu",
            "platform": "Linux-6.1-x86_64",
        },
        "libraries": {"peft": "0.18.0", "torch": "2.9.1", "transformers": "5.2.0", "treering": "0.1.0"},
        "rows": {task: [f"{task}-row-{number}" for number in range(1240)] for task in learned_now},
        "held_out": {task: [result.id for result in after if result.task == task] for task in matrix.tasks},
        "metrics": {result.task: result.metric for result in after},
        "evaluation": {"metric_version": 1, "max_new_tokens": 128},
        "scores": scores,
        "parent_scores": before_scores,
        "matrix": asdict(matrix),
        "summary": {**matrix.summary(), "negative_flips": None if math.isnan(flips) else flips},
        "verdict": verdict.as_dict(),
        "promote_wanted": True,
        "ordered": None,
        "memory": dict.fromkeys(matrix.tasks, 28),
        "cost": {
            "seconds": 228.4,
            "total_seconds": 301.5,
            "steps": 120,
            "rows_trained": 7440,
            "trainable_parameters": 2442240,
            "peak_memory_mb": 1843.2,
            "peak_gpu_memory_mb": None,
        },
        "range_test": None,
        "estimate": None,
    }


RATES: tuple[dict[str, float], ...] = (
    {TASKS[0]: 0.93},
    {TASKS[0]: 0.91, TASKS[1]: 0.88},
    {TASKS[0]: 0.92, TASKS[1]: 0.86, TASKS[2]: 0.97},
    {TASKS[0]: 0.92, TASKS[1]: 0.87, TASKS[2]: 0.97, TASKS[3]: 0.64},
)


@pytest.fixture
def manifest() -> dict[str, Any]:
    return make_manifest(TASKS, RATES, "v4")


class Page(HTMLParser):
    """A page as a browser reads it: the tags with their attributes, the text, the scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data + " "

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(folder: Path, manifest: Mapping[str, Any], log: Sequence[Mapping[str, float]] = ()) -> Page:
    return Page(report.write(folder, "v6", manifest, log).read_text(encoding="utf-8"))


def test_the_verdict_comes_first(tmp_path: Path, manifest: dict[str, Any]) -> None:
    text = page(tmp_path, manifest).text
    said = (
        "✓ Promoted Version v6 was promoted The gate’s reason: the new data was learned, and no old task is shown to be"
    )
    assert said in text
    assert text.index(said) < text.index("Key figures")
    assert "Trained on top of version v4 · 22 November 2025, 00:17 UTC · 1,240 new rows of 1 task, 3 min 48 s" in text


def test_a_held_version_says_why(tmp_path: Path) -> None:
    lost = {**RATES[3], TASKS[0]: 0.45}
    held = make_manifest(TASKS, [*RATES[:3], lost], "v4")
    text = page(tmp_path, held).text
    assert "✕ Held Version v6 was held The gate’s reason: cards: fell by" in text
    assert "more than the floor of 25.0 points" in text
    assert "✕ failed" in text


def test_a_version_kept_back_on_request_is_not_called_promoted(tmp_path: Path, manifest: dict[str, Any]) -> None:
    text = page(tmp_path, {**manifest, "promote_wanted": False}).text
    assert "Version v6 passed, and was not promoted As asked" in text


def test_a_hold_without_comparisons(tmp_path: Path, manifest: dict[str, Any]) -> None:
    verdict = gate.held_for("its parent v4 is no longer current").as_dict()
    text = page(tmp_path, {**manifest, "verdict": verdict}).text
    assert "The gate’s reason: its parent v4 is no longer current" in text
    assert "Nothing was compared" in text


def test_the_figures_are_those_of_the_manifest(tmp_path: Path, manifest: dict[str, Any]) -> None:
    text = page(tmp_path, manifest).text
    summary = manifest["summary"]
    assert f"Average accuracy {100 * summary['average_accuracy']:.1f}" in text
    assert f"Forgetting {100 * summary['forgetting']:.1f}".replace("-", "−") in text
    assert f"Negative flips {100 * summary['negative_flips']:.1f} %" in text
    for judgement in manifest["verdict"]["judgements"]:
        assert judgement["reason"] in text
    for heading in ("Score matrix", "What the gate judged", "Automatic choices", "Data", "Settings and surroundings"):
        assert heading in text
    for words in ("memory.replay_share 0.5", "default_system not set", "trainable parameters 2,442,240", "1,843 MB"):
        assert words.lower() in text.lower()


def test_the_matrix_has_a_row_an_update_and_a_column_a_task(tmp_path: Path, manifest: dict[str, Any]) -> None:
    found = page(tmp_path, manifest)
    cells = [attributes["class"] or "" for attributes in found.named("td") if "class" in attributes]
    shaded = [cell for cell in cells if re.match(r"s\d", cell)]
    measured = sum(score is not None for row in manifest["matrix"]["R"] for score in row)
    assert len(shaded) == measured == 4 + 3 + 2 + 1 + 3
    assert sum("first" in cell for cell in shaded) == len(TASKS)
    assert "3 · v4" in found.text
    assert "4 · v6" in found.text


def test_the_first_version(tmp_path: Path) -> None:
    text = page(tmp_path, make_manifest(TASKS[:1], RATES[:1], None), training_log(1)).text
    assert "First version, trained on the base model" in text
    assert text.count("not defined yet") == 4
    assert "Before: base model." in text


def test_nothing_measured_and_nothing_logged(tmp_path: Path, manifest: dict[str, Any]) -> None:
    empty = {task: {**found, "score": None} for task, found in manifest["scores"].items()}
    R = [*manifest["matrix"]["R"][:-1], [None] * len(TASKS)]
    found = page(
        tmp_path,
        {
            **manifest,
            "scores": empty,
            "parent_scores": {},
            "matrix": {**manifest["matrix"], "R": R},
            "summary": {},
            "verdict": {**manifest["verdict"], "judgements": ()},
        },
    )
    assert found.text.count("not defined yet") == 6
    assert "not measured" in found.text
    assert "No training steps were logged." in found.text
    assert len(found.scripts) == 2  # the plots (none) and what draws them


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    rates = [{TASKS[0]: 0.9}, {TASKS[0]: 0.9, HOSTILE: 0.8}]
    hostile = make_manifest((TASKS[0], HOSTILE), rates, "v4")
    hostile["choices"][HOSTILE] = {"value": HOSTILE, "reason": HOSTILE}
    hostile["config"]["lora_target"] = HOSTILE
    plain = page(tmp_path, make_manifest(TASKS[:2], [rates[0], {**rates[0], TASKS[1]: 0.8}], "v4"), training_log(9))
    log = [{HOSTILE if key == "distill" else key: value for key, value in entry.items()} for entry in training_log(9)]
    found = page(tmp_path, hostile, log)
    assert len(found.scripts) == len(plain.scripts) == 3
    assert not found.named("img")
    assert found.text.count(" ".join(HOSTILE.split())) >= 8
    assert found.scripts[1:] == plain.scripts[1:]
    (name,) = [curve["name"] for curve in json.loads(found.scripts[0])[0]["curves"] if curve["name"] != "cross entropy"]
    assert "<" not in name
    assert "</script><script>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_network_and_no_script_but_its_own(tmp_path: Path, manifest: dict[str, Any]) -> None:
    found = page(tmp_path, manifest, training_log(20))
    links = [tag.get(key) or "" for _, tag in found.tags for key in ("src", "href", "srcset", "action", "data")]
    assert all(link.startswith("#") for link in links if link)
    (policy,) = [tag["content"] or "" for tag in found.named("meta") if "http-equiv" in tag]
    assert "default-src 'none'" in policy
    allowed = [b64encode(sha256(script.encode()).digest()).decode() for script in found.scripts[1:]]
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == set(allowed)
    assert not [key for _, tag in found.tags for key in tag if key.startswith("on")]


def test_it_can_be_read_aloud(tmp_path: Path, manifest: dict[str, Any]) -> None:
    found = page(tmp_path, manifest, training_log(20))
    assert found.named("html")[0]["lang"] == "en"
    assert len(found.named("h1")) == 1
    assert len(found.named("caption")) == len(found.named("table"))
    assert all("scope" in heading for heading in found.named("th"))
    ids = [tag["id"] for _, tag in found.tags if "id" in tag]
    assert len(ids) == len(set(ids))
    plots = [tag["aria-label"] or "" for tag in found.named("div") if tag.get("role") == "img"]
    assert [label.split(" over")[0] for label in plots] == ["Loss", "Learning rate", "Speed"]
    assert re.search(r"cross entropy: [\d.]+ at step 1, [\d.]+ at step 20; distill: [\d.]+ at step 4", plots[0])


def test_the_range_test_is_drawn(tmp_path: Path, manifest: dict[str, Any]) -> None:
    """One point a rate that did not fail, in the order of the rates; the memory's only where there was one."""
    tried: list[dict[str, Any]] = [
        {"rate": 1e-3, "losses": {"new": 1.5, "old": 0.25}},
        {"rate": 2e-3, "losses": None},
        {"rate": 5e-4, "losses": {"new": 2.5, "old": 0.125}},
    ]
    test = {"value": 1e-3, "before": {"new": 4.0, "old": 0.1}, "tried": tried}
    found = page(tmp_path, {**manifest, "range_test": test}, training_log(9))
    *others, drawn = json.loads(found.scripts[0])
    assert [plot["over"] for plot in others] == ["step"] * 3 and drawn["over"] == "learning rate"
    assert [(curve["name"], curve["x"], curve["y"]) for curve in drawn["curves"]] == [
        ("other new rows", [5e-4, 1e-3], [2.5, 1.5]),
        ("remembered rows", [5e-4, 1e-3], [0.125, 0.25]),
    ]
    labels = [tag["aria-label"] or "" for tag in found.named("div") if tag.get("role") == "img"]
    assert labels[-1] == f"Range test: loss after a few steps over the learning rate: {drawn['words']}"
    assert drawn["words"].startswith(
        "other new rows: 4 before, 2.5 at 0.0005, 1.5 at 0.001; remembered rows: 0.1 before"
    )
    for one in tried:
        one["losses"] = one["losses"] and {"new": 1.5, "old": 0.0}
    first = json.loads(page(tmp_path, {**manifest, "range_test": test}, training_log(9)).scripts[0])[-1]
    assert [curve["name"] for curve in first["curves"]] == ["other new rows"]


def test_forty_tasks_and_updates(tmp_path: Path) -> None:
    tasks = [f"product line {number}" for number in range(40)]
    rates = [dict.fromkeys(tasks[: number + 1], 0.9) for number in range(40)]
    found = page(tmp_path, make_manifest(tasks, rates, "v39", rows=1))
    assert "product line 39" in found.text
    assert "40 · v6" in found.text


def test_a_long_log_is_thinned_and_keeps_its_ends(tmp_path: Path, manifest: dict[str, Any]) -> None:
    found = page(tmp_path, manifest, training_log(5000))
    steps = json.loads(found.scripts[0])[0]["curves"][0]["x"]
    assert (steps[0], steps[-1]) == (1, 5000)
    assert len(steps) <= report.MOST_POINTS + 1
    assert "(one point in 3 is drawn)" in found.text


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_shade_can_be_read(theme: str) -> None:
    for pair in report._shades(*report.RAMPS[theme]):
        dark, light = sorted(report.luminance(bytes.fromhex(colour[1:])) for colour in pair)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.26, "4.3 s"), (59.97, "60.0 s"), (60, "1 min 0 s"), (7380, "2 h 3 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert report._duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "sign", "words"),
    [(0.8749, "", "87.5"), (-0.0001, "+", "0.0"), (-0.02, "+", "−2.0"), (0.02, "+", "+2.0")],
)
def test_points(value: float, sign: str, words: str) -> None:
    assert report._points(value, sign) == words
