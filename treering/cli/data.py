"""`treering data`: the rows that are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from treering.cli.common import HERE, AsJson, Folder, app, find_version, opened, output
from treering.data.writer import Split
from treering.errors import UsageError

group = typer.Typer(help="The rows that are stored.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="data")


@group.command()
def export(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to: .json, .jsonl, or .parquet for parquet.")],
    format: Annotated[str, typer.Option(help="alpaca, sharegpt, openai, parquet or text.")],
    task: Annotated[str | None, typer.Option(help="Rows of this task alone.")] = None,
    split: Annotated[str, typer.Option(help="train or held_out.")] = "train",
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Write stored rows to a file that other tools read."""
    from treering.data.export import export as write

    if split not in ("train", "held_out"):
        raise UsageError(f"--split {split!r} is not known; it is train or held_out")
    done = write(opened(workspace), out, format, task, cast("Split", split))
    lines = [f"{done['rows']} rows written to {out}"]
    lines += [f"  left out, {count}: {why}" for why, count in done["left_out"].items()]
    output(done, as_json, lines)


@group.command()
def show(
    id: Annotated[str, typer.Argument(help="The row's id, or as much of it as names one.", metavar="ID")],
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Tell a row's whole story: what it says, where it came from, who learned it."""
    from treering.data.story import story

    found = story(opened(workspace), id)
    lines = [f"{key}: {found[key]}" for key in ("id", "task", "where", "file", "line", "added")]
    lines += [f"{key}: {', '.join(found[key]) or '-'}" for key in ("versions", "judged", "memory")]
    lines += [f"left out, for it says the same: {like['file']}, line {like['line']}" for like in found["likes"]]
    output(found, as_json, lines + [f"{turn['role']}: {turn['content']}" for turn in found["messages"]])


@group.command()
def trace(
    version: Annotated[str, typer.Argument(help="The version.", metavar="vN")],
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Say which rows a version learned, by task and by file."""
    from treering.data.story import trace as traced

    ws = opened(workspace)
    made = find_version(ws, version)
    if made is None:
        raise UsageError("the base model learned no rows of this workspace: name a version")
    found = traced(ws, made)
    lines = [f"{task}: {count} rows" for task, count in found["tasks"].items()]
    output(found, as_json, lines + [f"  {file}: {count}" for file, count in found["files"].items()])


@group.command()
def stats(
    task: Annotated[str | None, typer.Option(help="This task alone.")] = None,
    model: Annotated[bool, typer.Option("--model", help="Have models read new rows: how far, which labels.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Say what the rows of each task are like, and how new ones differ from those learned."""
    from treering.data.stats import stats as figures

    ws, looks = opened(workspace), None
    if model:
        from treering.looks import Looks

        looks = Looks(ws, quiet=as_json)
    found = figures(ws, task, looks)
    lines = [line for name, of in found.items() for line in _told(name, of)]
    if any(of["characters"] and of["languages"] is None for of in found.values()):
        lines.append("languages are not told, for lingua is not installed: pip install 'treering[language]'")
    output(found, as_json, lines or ["no rows are stored"])


def _told(name: str, of: dict[str, Any]) -> list[str]:
    lines = [f"{name}: " + ", ".join(f"{count} {where.replace('_', ' ')}" for where, count in of["rows"].items())]
    if of["characters"]:
        lines.append("  characters: " + ", ".join(f"{key} {value}" for key, value in of["characters"].items()))
    if of["languages"]:
        shown = ", ".join(f"{language} {count}" for language, count in of["languages"].items())
        lines.append(f"  languages of {sum(of['languages'].values())} rows: {shown}")
    if of["labels"]:
        shown = ", ".join(f"{label} {count}" for label, count in of["labels"].items())
        lines.append(
            f"  {of['label_count']} labels: {shown}" + (", ..." if of["label_count"] > len(of["labels"]) else "")
        )
    lines += [f"  the rare label {rare!r} looks like {often!r}" for rare, often in of["slips"].items()]
    lines += [f"  out of balance: {of['imbalance']:.0f} to 1"] if of["imbalance"] else []
    drift = dict(of["drift"] or {})
    distance = drift.pop("embedding", None)
    bits = ", ".join(f"{what} {value:.2f}" for what, value in drift.items())
    lines += [f"  new rows differ from those learned, in bits: {bits}"] if bits else []
    lines += [] if distance is None else [f"  their means are {distance:.2f} standard deviations apart"]
    lines += [f"  {len(of['doubts'])} new labels are doubted"] if of["doubts"] is not None else []
    for doubt in of["doubts"] or ():
        sure = f"{doubt['likely']!r} ({doubt['probability']:.2f})"
        lines += [f"    {doubt['file']}, line {doubt['line']}: {doubt['label']!r}, or {sure}?"]
    return lines
