"""The rows that are stored: out again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from treering.cli.common import HERE, AsJson, Folder, app, opened, output
from treering.data.dedup import Split
from treering.errors import UsageError

group = typer.Typer(help="The rows that are stored.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="data")


@group.command()
def export(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to: .json, .jsonl, or .parquet for parquet.")],
    format: Annotated[str, typer.Option(help="alpaca, sharegpt, openai or parquet.")],
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
