"""Using a version: score it on any file, answer a file of prompts, chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.data.example import Example, Message
from treering.data.read import Bad, Row, find_files, read
from treering.errors import UsageError, full_disk_is_clear
from treering.evaluate import evaluate
from treering.files import write_file
from treering.greedy import generate
from treering.model import load, load_tokenizer, resolve
from treering.progress import Advance, silent
from treering.registry import Version
from treering.results import read_results, task_scores
from treering.scoring import conditions, metric_for, scorers, wanted

if TYPE_CHECKING:
    from treering.workspace import Workspace


class Answerer:
    """A version (or the base model, for None) loaded and ready to answer."""

    def __init__(self, ws: Workspace, version: Version | None) -> None:
        self.config = ws.config()
        base = resolve(self.config.model_name_or_path, self.config.trust_remote_code)
        self.name = version.name if version else "base"
        self.tokenizer = load_tokenizer(base, self.config.trust_remote_code)
        self.model = load(base, self.config, version)

    def answer(self, prompts: Sequence[Sequence[Message]], advance: Advance = silent) -> list[str]:
        """Greedy answers, in the order of `prompts`."""
        limits = [self.config.eval.max_new_tokens] * len(prompts)
        return generate(self.model, self.tokenizer, prompts, limits, self.config, advance=advance)


def score(
    ws: Workspace, version: Version | None, *, data: Path | None = None, task: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Scores per task on the catalog's held-out rows, or on the rows of `data`.

    Results that the version keeps are not measured again, unless the settings of scoring have changed.
    """
    if data is not None:
        rows, refused = _read(ws, data)
        pairs = [(row.example, task or "data") for row in rows]
    else:
        refused = []
        held_out = {t: ids for t, ids in ws.catalog.held_out().items() if task in (None, t)}
        if not held_out:
            raise UsageError(f"no held-out rows{f' of task {task!r}' if task else ''} are stored; ingest some first")
        examples = ws.catalog.examples([id for ids in held_out.values() for id in ids])
        pairs = [(examples[id], t) for t, ids in held_out.items() for id in ids]
    known = version.check().manifest["metrics"] if version else {}
    kept = {}
    if version is not None and data is None and version.manifest["evaluation"] == conditions(ws.config(), ws.root):
        kept = {r.id: r for r in read_results(version.folder / "results.parquet")}
    missing = [(example, t) for example, t in pairs if example.id not in kept]
    metrics = {t: known.get(t) or _metric(ws, t, [e for e, name in pairs if name == t]) for t in {t for _, t in pairs}}
    results = [kept[example.id] for example, _ in pairs if example.id in kept]
    if missing:
        loaded = Answerer(ws, version)
        named, ways = wanted(loaded.config, metrics), scorers(loaded.config, ws.root)
        results += evaluate(loaded.model, loaded.tokenizer, missing, named, loaded.config, scorers=ways, quiet=quiet)
    return {
        "version": version.name if version else "base",
        "tasks": task_scores(results, {example.id: example for example, _ in pairs}),
        "quarantined": [f"{bad.file}, line {bad.line}: {bad.reason}" for bad in refused],
    }


def predict(ws: Workspace, version: Version | None, source: Path, target: Path, quiet: bool = False) -> dict[str, Any]:
    """Answer every row of `source`; `target` gets a JSON line a row: messages, prediction, answer if given, version."""
    from treering.progress import bar

    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"--output {target} is no file in an existing folder; name one")
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"--output {target} is the --input itself, which would be lost; name another file")
    rows, refused = _read(ws, source, need_answer=False)
    if not rows:
        raise UsageError(
            f"{source} holds no row to answer" + "".join(f"; line {b.line}: {b.reason}" for b in refused[:3])
        )
    loaded = Answerer(ws, version)
    asked = [_split(row.example) for row in rows]
    with bar("answering", len(rows), quiet) as advance:
        answers = loaded.answer([prompt for prompt, _ in asked], advance)
    lines = [
        {
            "messages": [turn.as_dict() for turn in prompt],
            "prediction": answer,
            **({"answer": wanted} if wanted is not None else {}),
            "version": loaded.name,
        }
        for (prompt, wanted), answer in zip(asked, answers, strict=True)
    ]
    with full_disk_is_clear(target.parent):
        write_file(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return {
        "version": loaded.name,
        "rows": len(rows),
        "output": str(target),
        "quarantined": [f"{bad.file}, line {bad.line}: {bad.reason}" for bad in refused],
    }


def _split(example: Example) -> tuple[Sequence[Message], str | None]:
    """The turns to answer, and the right answer if the row has one."""
    if example.messages[-1].role == "assistant":
        return example.prompt, example.answer
    return example.messages, None


def _read(ws: Workspace, path: Path, need_answer: bool = True) -> tuple[list[Row], list[Bad]]:
    rows: list[Row] = []
    refused: list[Bad] = []
    for file in find_files(path):
        for found in read(file, system=ws.config().default_system, need_answer=need_answer):
            if isinstance(found, Row):
                rows.append(found)
            else:
                refused.append(found)
    return rows, refused


def _metric(ws: Workspace, task: str, scored: Sequence[Example]) -> str:
    """What an update would choose: by the task's training rows, or by the scored ones of a task that has none."""
    trained = ws.catalog.examples(ws.catalog.train_ids(task)).values()
    return metric_for(trained or scored)
