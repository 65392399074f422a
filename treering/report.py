"""The report of a version: one HTML file that opens anywhere, with no network.

All of it comes from the manifest and the training log. Names of tasks are user input: Jinja2 escapes every value, and
the page's own policy runs no script but those whose hashes it states.
"""

from __future__ import annotations

import html
import json
import math
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.files import write_file
from treering.scaling import SCALE, SKIPPED

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).with_name("templates")

SHADES = 21
"""Steps of the colour scale: one every 5 points."""

RAMPS = {"light": ("#f0f5fb", "#0a4286"), "dark": ("#1b2733", "#9fcdfb")}
"""Colours of score 0 and 100: one hue, so that it reads the same to every eye, and on paper."""

NO_LOSSES = {"step", "lr", "grad_norm", "tokens_per_second", SCALE, SKIPPED}
"""What the log has beside losses."""

NAMES = {"loss": "cross entropy", "eval_loss": "cross entropy on rows kept aside"}
"""Losses of the log that are called otherwise in the report."""

MOST_POINTS = 2000
"""Longer curves are thinned: a screen shows no more, and the file stays small."""


def write(folder: Path, name: str, manifest: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> Path:
    """Write `report.html` for the version `name` into `folder`."""
    path = folder / "report.html"
    write_file(path, template("report.html.j2").render(_content(name, manifest, log)).encode())
    return path


@cache
def template(name: str) -> Template:
    """The page `name` of `templates/`; compiling it takes longer than many an update's arithmetic."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    env.filters |= {"points": _points, "duration": _duration, "text": _text, "csp": csp_hash}
    return env.get_template(name)


def _content(name: str, manifest: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    from plotly.offline import get_plotlyjs

    return {
        "name": name,
        "manifest": manifest,
        "created": datetime.fromisoformat(manifest["created"]),
        "updates": _updates(name, manifest),
        "tasks": [_task(task, manifest) for task in _task_names(manifest)],
        "shades": {theme: _shades(*ramp) for theme, ramp in RAMPS.items()},
        "settings": dict(_flat(manifest["config"])),
        "plots": [*_plots(log), *_rates_plot(manifest["range_test"])] if log else [],
        "plotly": get_plotlyjs() if log else "",
    }


def _task_names(manifest: Mapping[str, Any]) -> list[str]:
    keys = ("scores", "parent_scores", "rows", "held_out", "memory")
    return list(dict.fromkeys([*manifest["matrix"]["tasks"], *(task for key in keys for task in manifest[key])]))


def _updates(name: str, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The score matrix, a row an update; the manifest names the last two versions only."""
    matrix = manifest["matrix"]
    names = dict(enumerate((manifest["parent"], name), len(matrix["R"]) - 2))
    return [
        {
            "name": names.get(number),
            "cells": [
                {
                    "score": score,
                    "shade": None if score is None else round(score * (SHADES - 1)),
                    "first": learned == number,
                }
                for score, learned in zip(scores, matrix["learned"], strict=True)
            ],
        }
        for number, scores in enumerate(matrix["R"])
    ]


def _task(task: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    matrix = manifest["matrix"]
    before, after = (manifest[key].get(task) or {} for key in ("parent_scores", "scores"))
    score_before, score = before.get("score"), after.get("score")
    first = dict(zip(matrix["tasks"], matrix["learned"], strict=True)).get(task) == len(matrix["R"]) - 1
    return {
        "name": task,
        "taught": "first taught" if first else "taught more" if task in manifest["rows"] else "not taught",
        "score_before": score_before,
        "score": score,
        "change": None if score is None or score_before is None else score - score_before,
        "loss_before": before.get("loss"),
        "loss": after.get("loss"),
        "metric": after.get("metric", manifest["metrics"].get(task)),
        "measures": after.get("measures", {}),
        "new_rows": len(manifest["rows"].get(task, ())),
        "held_out_rows": len(manifest["held_out"].get(task, ())),
        "memory_rows": manifest["memory"].get(task, 0),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _plots(log: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """The curves, plot by plot; how they look is the template's."""
    terms = dict.fromkeys(term for entry in log for term in entry if term not in NO_LOSSES)
    return [
        _plot(log, "Loss", "loss", {term: NAMES.get(term, term) for term in terms}),
        _plot(log, "Learning rate", "learning rate", {"lr": "learning rate"}),
        _plot(log, "Speed", "tokens per second", {"tokens_per_second": "tokens per second"}),
    ]


def _plot(log: Sequence[Mapping[str, float]], title: str, unit: str, terms: Mapping[str, str]) -> dict[str, Any]:
    curves, words = [], []
    for term, name in terms.items():
        points = [(entry["step"], entry[term]) for entry in log if term in entry]
        (first, start), (last, end) = points[0], points[-1]
        words.append(f"{name}: {start:.4g} at step {first:.0f}, {end:.4g} at step {last:.0f}")
        every = math.ceil(len(points) / MOST_POINTS)
        if every > 1:
            words[-1] += f" (one point in {every} is drawn)"
        x, y = zip(*points[:-1:every], points[-1], strict=True)
        # plotly reads tags in a name as markup.
        curves.append({"name": html.escape(name, quote=False), "x": x, "y": y})
    return {"title": title, "over": "step", "unit": unit, "curves": curves, "words": "; ".join(words)}


def _rates_plot(test: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What the range test measured at each rate, beside what there was before."""
    if test is None:
        return []
    tried = sorted((one for one in test["tried"] if one["losses"]), key=lambda one: one["rate"])
    curves, words = [], []
    for kind, name in {"new": "other new rows", "old": "remembered rows"}.items():
        x, y = [one["rate"] for one in tried], [one["losses"][kind] for one in tried]
        if x and any(y):
            curves.append({"name": name, "x": x, "y": y})
            found = ", ".join(f"{loss:.4g} at {rate:g}" for rate, loss in zip(x, y, strict=True))
            words.append(f"{name}: {test['before'][kind]:.4g} before, {found}")
    if not curves:
        return []
    words.append(f"{test['value']:g} was taken")
    plot = {"title": "Range test: loss after a few steps", "over": "learning rate", "unit": "loss", "curves": curves}
    return [{**plot, "words": "; ".join(words)}]


def _shades(low: str, high: str) -> list[tuple[str, str]]:
    """Background and text colour of each step from `low` to `high`; black or white, whichever is read better."""
    found = []
    for step in range(SHADES):
        ends = zip(bytes.fromhex(low[1:]), bytes.fromhex(high[1:]), strict=True)
        rgb = bytes(round(a + (b - a) * step / (SHADES - 1)) for a, b in ends)
        # At this luminance black and white have the same contrast (WCAG 2).
        found.append(("#" + rgb.hex(), "#000000" if luminance(rgb) > 0.179 else "#ffffff"))
    return found


def luminance(rgb: bytes) -> float:
    """How bright a colour is, 0 to 1, as WCAG 2 defines it."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _points(value: float, sign: str = "") -> str:
    """A fraction on the scale to 100, with a true minus; `sign="+"` shows the plus, too. Zero has no sign."""
    rounded = round(100 * value, 1)
    return f"{rounded:{sign}.1f}".replace("-", "−") if rounded else "0.0"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _text(value: Any) -> str:
    """A setting as a person would write it."""
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def csp_hash(script: str) -> str:
    """What a page's policy names to let this very script run."""
    return "sha256-" + b64encode(sha256(script.encode()).digest()).decode()
