"""`treering forget`: delete rows on request, and teach again without them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treering.cli.common import HERE, AsJson, Folder, app, opened, output
from treering.errors import UsageError

if TYPE_CHECKING:
    from treering.forget import Forgotten, Found
    from treering.workspace import Workspace


@app.command()
def forget(
    ids: Annotated[Path | None, typer.Option(metavar="FILE", help="Ids of rows, one a line.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="task=NAME, file=NAME, answer=TEXT, text~PART, added<DATE: all hold."),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Go back to the last version that learned none, and update from there.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Delete rows for good: stored texts, memory, held-out side, quarantine, exports."""
    from treering import forget as forgetting

    ws = opened(workspace)
    result: dict[str, Any] = {"found": 0, "alike": 0, "files": {}}
    lines: list[str] = []
    if ids is not None or where or not rebuild:
        found = forgetting.find(ws, None if ids is None else _read(ids), where or ())
        result |= {"found": found.rows, "alike": found.alike, "files": found.files}
        if not dry_run and result["found"]:
            _ask(result["found"], yes, as_json)
            done = forgetting.forget(ws, found)
            result |= done.as_dict()
            lines += _told(done)
        else:
            lines += _would_go(found)
    if rebuild and not dry_run:
        rebuilt, more = _rebuild(ws, as_json)
        result |= rebuilt
        lines += more
    output(result, as_json, lines)
    if result.get("unfinished"):
        raise typer.Exit(1)


def _read(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--ids {file} cannot be read ({error}); name a text file with one id a line") from None


def _ask(rows: int, yes: bool, as_json: bool) -> None:
    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise UsageError(f"{_rows(rows)} would be deleted for good; say so with --yes, or look first with --dry-run")
    typer.confirm(f"delete {_rows(rows)} for good?", abort=True, err=True)


def _rows(count: int, of: str = "") -> str:
    return f"{count} {of}row{'' if count == 1 else 's'}"


def _would_go(found: Found) -> list[str]:
    lines = [f"{_rows(found.stored, 'stored ')} and {found.refused} in quarantine are meant"]
    lines += [f"  {found.alike} of them for saying the same as others that were named"] if found.alike else []
    return lines + [f"  {file}: {count}" for file, count in found.files.items()]


def _told(done: Forgotten) -> list[str]:
    from treering.forget import READERS

    lines = [f"{_rows(done.rows)} deleted, not to come in again"]
    lines += [f"  NOT FINISHED: {READERS}"] if done.unfinished else []
    if done.unknown:
        lines += [f"  but for {done.unknown} of which quarantine had no text to know them by"]
    lines += [f"  {count} came from {file}, which is yours and stays as it is" for file, count in done.files.items()]
    lines += [f"  written anew without them: {file}" for file in done.exports]
    lines += [f"  MAY STILL HAVE THEM: {file}: {why}" for file, why in done.kept_exports.items()]
    lines += [f"  DAMAGED, STAYS AS IT IS: {what}" for what in done.damaged]
    if done.versions:
        lines += [f"  what was learned from them stays in the weights of {', '.join(done.versions)}"]
    if done.current:
        lines += ["  and so in the current version's: `treering forget --rebuild` teaches all else again"]
    return lines


def _rebuild(ws: Workspace, as_json: bool) -> tuple[dict[str, Any], list[str]]:
    from treering import pipeline, registry
    from treering.forget import untaught

    current = registry.current(ws)
    if current is None or not registry.unlearned(ws, current):
        return {}, ["what serves learned no row that was deleted since; there is nothing to rebuild"]
    back = untaught(ws)
    name = back.name if back else "base"
    ws.rollback(name)
    done = pipeline.update(ws, inbox=False, quiet=as_json)
    made = done.version.name if done.version else None
    lines = [f"went back to {name}; {made or 'no version'}: {done.status}, {done.reason}"]
    return {"rebuilt": {"from": name, "status": done.status, "reason": done.reason, "version": made}}, lines
