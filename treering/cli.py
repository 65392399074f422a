"""The commands: parse, call, print. Heavy imports stay inside, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treering import __version__

if TYPE_CHECKING:
    from treering.registry import Version
    from treering.workspace import Workspace

app = typer.Typer(
    name="treering",
    help="Keeps teaching a language model without letting it forget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure methods against each other.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")
feedback = typer.Typer(help="What users said of answers.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(feedback, name="feedback")
keys = typer.Typer(help="Keys for the server.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys, name="keys")

Folder = Annotated[Path, typer.Option("--workspace", "-w", metavar="DIR", help="The workspace's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Host = Annotated[str, typer.Option(help="Address to listen on; others than loopback need a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
HERE = Path()
INTERRUPTED = 130  # What typer makes of Ctrl-C, as shells do.


def _print_version(asked: bool) -> None:
    if asked:
        print(f"treering {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="Folder of the new workspace.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a hub name.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="PEFT_FOLDER", help="An adapter that becomes v1.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="CONFIG.yaml", help="Take settings from here.")
    ] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a workspace."""
    from treering.importers import Imported, read_config
    from treering.workspace import Workspace

    imported = read_config(source) if source else Imported()
    settings = imported.settings | ({"model_name_or_path": model} if model else {})
    base = settings.get("model_name_or_path")
    if base and Path(base).is_dir():
        # A path relative to here would mean nothing to a command that is run elsewhere.
        settings["model_name_or_path"] = str(Path(base).resolve())
    ws = Workspace.create(directory or workspace, adapter=adapter or imported.adapter, **settings)
    from treering import registry

    current = registry.current(ws)
    result = {
        "workspace": str(ws.root),
        "settings": settings,
        "not_carried": imported.left,
        "version": current.name if current else None,
    }
    lines = [f"made {ws.root}"]
    lines += [f"{key}: {value}" for key, value in settings.items()]
    lines += [f"not carried over: {key} ({why})" for key, why in imported.left.items()]
    lines += [f"{adapter or imported.adapter} is {current.name}"] if current else []
    lines += [f"next: put files into {ws.inbox}/<task>/ and run `treering update`"]
    _show(result, as_json, lines)


@app.command()
def ingest(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH...", help="Files or folders; else the inbox.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of all rows; else told by the folder.")] = None,
    held_out: Annotated[
        Path | None, typer.Option("--held-out", metavar="PATH", help="Rows to judge by, never trained.")
    ] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Take rows in: read, check, deduplicate, store."""
    ws = _open(workspace)
    done = ws.ingest(paths or None, task=task, held_out=held_out, quiet=False)
    lines = [
        f"{done.rows} rows: {done.accepted} accepted ({done.held_out} held out), "
        f"{done.duplicates} duplicates, {done.quarantined} quarantined"
    ]
    lines += [f"  {task_name}: {count}" for task_name, count in done.tasks.items()]
    lines += [f"  quarantined by {rule}: {count}" for rule, count in done.reasons.items()]
    if done.quarantined:
        lines += [f"  {q['file']}, line {q['line']}: {q['reason']}" for q in ws.catalog.quarantined()[-10:]]
    _show(done.as_dict(), as_json, lines)


@app.command()
def update(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings for this update.")
    ] = None,
    no_promote: Annotated[bool, typer.Option("--no-promote", help="Keep the candidate, leave current.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Run one update over everything new. Exit code 2: held by the gate."""
    from treering import pipeline

    outcome = pipeline.update(_open(workspace), settings or [], promote=not no_promote, dry_run=dry_run)
    version = outcome.version
    result: dict[str, Any] = {
        "status": outcome.status,
        "reason": outcome.reason,
        "version": version.name if version else None,
    }
    head = version.name if version and outcome.reason == version.summary else f"{outcome.status}:"
    lines = [f"{head} {outcome.reason}"]
    if outcome.plan:
        result["plan"] = outcome.plan
        lines += [f"  {task}: {count} new rows" for task, count in outcome.plan["rows"].items()]
    if version is not None:
        result |= {"scores": version.scores, "verdict": version.manifest["verdict"]}
        result["report"] = str(version.folder / "report.html")
        lines += _choices(version) + _matrix(version) + [f"report: {result['report']}"]
    _show(result, as_json, lines)
    if version is not None and (not version.promote or (outcome.status == "held" and not no_promote)):
        raise typer.Exit(2)


@app.command()
def status(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """What serves, what waits, what is stored."""
    from treering import overview

    found = overview.status(_open(workspace))
    lines = [f"{found['workspace']}: {found['current'] or 'no version yet'} is current, {found['versions']} versions"]
    lines += [f"  {task}: {_percent(value)}" for task, value in found["scores"].items()]
    lines += [f"waiting: {task}, {count} rows" for task, count in found["waiting"].items()] or ["nothing waits"]
    lines += [f"in the inbox, not ingested yet: {name}" for name in found["inbox"]]
    lines += ["stored: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found["rows"].items())]
    lines += (
        ["an update runs or was interrupted; `treering update` resumes an interrupted one"]
        if found["interrupted"]
        else []
    )
    automation = found["automation"]
    if automation["problem"] is not None:
        lines += [f"UPDATES BY THEMSELVES HAVE STOPPED: {automation['problem']}"]
    elif automation["running"] or automation["updates_today"]:
        lines += [
            f"by itself today: {automation['updates_today']} updates, {automation['minutes_today']:g} minutes"
            + (", one runs" if automation["running"] else "")
        ]
    _show(found, as_json, lines)


@app.command()
def watch(
    once: Annotated[bool, typer.Option("--once", help="Do what there is to do now, then end.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after failures stopped it.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Update by itself when files come or it is time. Exit code 1: failures stopped it."""
    from treering.automate import loop
    from treering.errors import LockError
    from treering.stop import stop_on_signals

    ws = _open(workspace)
    resumed = resume and loop.resume(ws)
    automation = loop.Automation(ws)
    try:
        with stop_on_signals() as stop:
            ended: str = automation.run(stop, once=once)
    except LockError:
        if not resumed:
            raise
        ended = "resumed"  # By the loop that runs already.
    from treering import registry

    current = registry.current(ws)
    result = {"ended": ended, "reason": automation.state.stopped, "current": current.name if current else None}
    serves = f"{current.name} is current" if current else "no version yet"
    _show(result, as_json, [f"{ended}: {automation.state.stopped or serves}"])
    if ended in ("stopped", "failed"):
        raise typer.Exit(1)


@app.command()
def history(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """What happened here, newest last: updates by themselves, promotions, rollbacks."""
    from treering.automate import events

    found = events.history(_open(workspace))
    _show({"events": found}, as_json, [events.describe(entry) for entry in found] or ["nothing happened yet"])


@app.command()
def versions(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """All versions, oldest first."""
    from treering import overview

    found = overview.list_versions(_open(workspace))
    lines = [
        f"{'*' if v['name'] == found['current'] else ' '} {v['name']:5} from {v['parent'] or 'base':5} {v['created']}  "
        f"average {_percent(v['average_accuracy'])}  forgetting {_percent(v['forgetting'])}  {v['verdict']}"
        for v in found["versions"]
    ]
    _show(found, as_json, lines or ["no version yet"])


@app.command()
def show(
    version: Annotated[str, typer.Argument(metavar="vN")], workspace: Folder = HERE, as_json: AsJson = False
) -> None:
    """Everything a version says of itself."""
    from treering import registry

    found = registry.get(_open(workspace), version)
    report = found.folder / "report.html"  # An adopted version has none.
    manifest = {**found.manifest, "report": str(report) if report.exists() else None}
    verdict = found.manifest["verdict"]
    lines = [f"{found.name}, from {found.parent or 'the base model'}, {manifest['created']}: {verdict['summary']}"]
    lines += [f"  {j['name']}: {j['reason']}" for j in verdict["judgements"]]
    lines += _choices(found) + _matrix(found)
    lines += [
        f"rows learned: {len(found.rows)}; files: {len(manifest['files'])}; report: {manifest['report'] or 'none'}"
    ]
    _show(manifest, as_json, lines)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="vA")],
    second: Annotated[str, typer.Argument(metavar="vB")],
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Two versions side by side, on the rows both were scored on."""
    from treering import overview, registry

    ws = _open(workspace)
    found = overview.compare(ws, registry.get(ws, first), registry.get(ws, second))
    a, b = found["versions"]
    lines = []
    for task, row in found["tasks"].items():
        text = f"{task}: {a} {_percent(row[a])}, {b} {_percent(row[b])}"
        if "difference" in row:
            bounds = f"{100 * row['lower']:+.1f} to {100 * row['upper']:+.1f}"
            text += f", difference {100 * row['difference']:+.1f} ({bounds}) on {row['rows']} rows"
            text += f"; {len(row['lost'])} lost, {len(row['gained'])} gained"
        lines.append(text)
    lines += [f"setting {key}: {a} {old}, {b} {new}" for key, (old, new) in found["settings"].items()]
    _show(found, as_json, lines or ["neither version was scored"])


@app.command()
def promote(
    version: Annotated[str, typer.Argument(metavar="vN")],
    force: Annotated[bool, typer.Option("--force", help="Even if the gate held it.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a version current."""
    name = _open(workspace).promote(version, force=force).name
    _show({"current": name}, as_json, [f"{name} is current"])


@app.command()
def rollback(
    version: Annotated[str | None, typer.Argument(metavar="[vN]")] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Go back to the version promoted before, or to the one named."""
    found = _open(workspace).rollback(version)
    name = found.name if found else None
    _show({"current": name}, as_json, [f"{name or 'the base model'} serves; rows learned since are new again"])


@app.command()
def canary(
    version: Annotated[str | None, typer.Argument(metavar="[vN]", help="Else say how it goes.")] = None,
    share: Annotated[float | None, typer.Option(help="Of the requests for current, those it answers; 0.1.")] = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="Ask it as well, compare, send nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if the gate held it.")] = False,
    off: Annotated[bool, typer.Option("--off", help="End it.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Try a version on the traffic of the server."""
    from treering import canary as trial
    from treering import figures

    if version is None and (share is not None or shadow or force):
        raise typer.BadParameter("name the version to try, such as v3")
    if version is not None and off:
        raise typer.BadParameter("give a version or --off, not both")
    ws = _open(workspace)
    if off:
        trial.stop(ws)
    elif version is not None:
        trial.start(ws, version, share, shadow=shadow, force=force)
    found = figures.report(ws)
    _show(found, as_json, figures.describe(found))


@app.command()
def verify(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """Check every version against its hashes. Exit code 1: something was changed."""
    from treering import overview

    found = overview.verify(_open(workspace))
    _show(found, as_json, found["problems"] or [f"{found['versions']} versions, all as they were made"])
    if not found["ok"]:
        raise typer.Exit(1)


@app.command()
def evaluate(
    version: Annotated[str | None, typer.Argument(metavar="[vN]", help="Else current, or the base model.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Rows with answers; else the held-out rows.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only this task, or the name to give --data.")] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Score a version."""
    from treering import answers

    ws = _open(workspace)
    found = answers.score(ws, _version(ws, version), data=data, task=task)
    lines = [
        f"{name}: {_percent(row['score'])} ({row['metric']}, {row['rows']} rows), loss {row['loss']:.3f}"
        for name, row in found["tasks"].items()
    ]
    _show(found, as_json, [f"{found['version']}:", *lines, *(f"left out: {q}" for q in found["quarantined"])])


@app.command()
def predict(
    source: Annotated[Path, typer.Option("--input", metavar="FILE", help="Rows in any known format.")],
    target: Annotated[Path, typer.Option("--output", metavar="FILE", help="JSON Lines to write.")],
    version: Annotated[str | None, typer.Argument(metavar="[vN]")] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Answer every row of a file."""
    from treering import answers

    ws = _open(workspace)
    found = answers.predict(ws, _version(ws, version), source, target)
    lines = [f"{found['version']} answered {found['rows']} rows: {found['output']}"]
    _show(found, as_json, lines + [f"left out: {q}" for q in found["quarantined"]])


@app.command()
def chat(
    version: Annotated[str | None, typer.Argument(metavar="[vN]")] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Talk to a version. With --json: one message on standard input, one object out."""
    from treering.answers import Answerer
    from treering.data.example import Message

    ws = _open(workspace)
    loaded = Answerer(ws, _version(ws, version))
    system = [Message("system", loaded.config.default_system)] if loaded.config.default_system else []
    if as_json:
        answer = loaded.answer([[*system, Message("user", sys.stdin.read().strip())]])[0]
        _show({"version": loaded.name, "answer": answer}, as_json, [])
        return
    print(f"{loaded.name}; an empty line ends the chat", file=sys.stderr)
    turns = list(system)
    for line in _lines():
        turns.append(Message("user", line))
        turns.append(Message("assistant", loaded.answer([turns])[0]))
        print(turns[-1].content, flush=True)


@app.command()
def serve(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Answer over an OpenAI-compatible API, always with the current version."""
    from treering.serve.run import serve as run_server

    run_server(_open(workspace), host, port, ready=lambda url: _listening(url, as_json))


@app.command("run")
def serve_and_update(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Serve and update by itself, in one process: `serve` and `watch` together."""
    from treering.serve.run import serve as run_server

    run_server(_open(workspace), host, port, updates=True, ready=lambda url: _listening(url, as_json))


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Option(help="Who or what it is for.")] = "",
    scope: Annotated[str, typer.Option(help="`api` to ask, `admin` to promote and roll back as well.")] = "api",
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Its own limit.")] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once; only its hash is kept."""
    from treering.serve import keys as store

    key, secret = store.create(_open(workspace), name, scope, requests_per_minute)
    _show({"id": key.id, "name": key.name, "scope": key.scope, "key": secret}, as_json, [secret, f"its id: {key.id}"])


@keys.command("list")
def keys_list(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """The keys there are, without what is secret."""
    from treering.serve import keys as store

    found = [key.model_dump(exclude={"sha256"}) for key in store.read(_open(workspace).root)]
    lines = [f"{key['id']}  {key['scope']:5}  {key['created']}  {key['name']}" for key in found]
    _show({"keys": found}, as_json, lines or ["no key yet"])


@keys.command("revoke")
def keys_revoke(
    id: Annotated[str, typer.Argument(metavar="ID")], workspace: Folder = HERE, as_json: AsJson = False
) -> None:
    """Take a key away; a running server refuses it at once."""
    from treering.serve import keys as store

    key = store.revoke(_open(workspace), id)
    _show({"revoked": key.id}, as_json, [f"{key.id} ({key.name or 'no name'}) is revoked"])


Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids, or `all` that make a row.")]


@feedback.command("list")
def feedback_list(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """What waits for a decision, and how much was decided."""
    from treering import feedback as store

    entries = store.read(_open(workspace))
    waiting = [entry for entry in entries if entry.state == "waiting"]
    counts = {state: sum(entry.state == state for entry in entries) for state in ("accepted", "rejected")}
    lines = [
        f"{e.id}  {e.time}  {e.feedback.rating or '-':4}  {e.feedback.messages[-1].get('content')!r}: "
        f"{e.feedback.answer!r}" + (f" -> {e.feedback.correction!r}" if e.feedback.correction else "")
        for e in waiting
    ]
    lines.append(f"{len(waiting)} waiting, {counts['accepted']} accepted, {counts['rejected']} rejected")
    _show({"waiting": [entry.model_dump(mode="json") for entry in waiting], **counts}, as_json, lines)


@feedback.command("accept")
def feedback_accept(ids: Ids, workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """Make rows of feedback: files in the inbox, which the next update reads and checks."""
    from treering import feedback as store

    ws = _open(workspace)
    chosen = [entry.id for entry in store.waiting(store.read(ws))] if ids == ["all"] else ids
    files = [str(path) for path in store.accept(ws, chosen)]
    _show({"accepted": len(chosen), "files": files}, as_json, [f"{len(chosen)} rows", *files])


@feedback.command("reject")
def feedback_reject(ids: Ids, workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """Decide that feedback makes no rows."""
    from treering import feedback as store

    ws = _open(workspace)
    chosen = [e.id for e in store.read(ws) if e.state == "waiting"] if ids == ["all"] else ids
    store.reject(ws, chosen)
    _show({"rejected": len(chosen)}, as_json, [f"{len(chosen)} rejected"])


@bench.command()
def quality(
    data: Annotated[Path, typer.Option(metavar="DIR", help="One folder a task, with train and test files.")],
    methods: Annotated[str, typer.Option(help="Names separated by commas.")] = "naive,replay,treering,joint",
    per_label: Annotated[int | None, typer.Option(min=1, help="Training rows a label.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Training rows a task.")] = None,
    eval_rows: Annotated[int | None, typer.Option(min=1, help="Test rows a task.")] = None,
    memory: Annotated[str, typer.Option(metavar="N|N%", help="Memory size.")] = "auto",
    epochs: Annotated[float, typer.Option(help="Passes over each task's rows.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of rows, order and training.")] = 42,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a hub name.")] = None,
    work: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep workspaces and finished results here.")] = None,
    as_json: AsJson = False,
) -> None:
    """A stream of tasks through several methods, at the same rate and epochs."""
    from treering.bench import Stream, run_quality, table

    if per_label and rows:
        raise typer.BadParameter("give --per-label or --rows, not both")
    stream = Stream(data, per_label, rows, eval_rows, memory, epochs, seed, model)
    found = run_quality(stream, [name.strip() for name in methods.split(",") if name.strip()], work)
    _show(found, as_json, table(found))


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 runtime error, 2 held by the gate, 3 usage or configuration error, 130 interrupted.
    """
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    from treering.errors import TreeringError

    as_json = "--json" in arguments
    try:
        code = app(args=arguments, prog_name="treering", standalone_mode=False)
    except TreeringError as error:
        return _fail(str(error), error.exit_code, as_json)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        return _fail(str(error), 1, as_json)
    except Exception as error:
        # Typer's own usage errors carry a way to print themselves; anything else is a bug to see whole.
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message(), 3, as_json)
    if code == INTERRUPTED:
        return _fail("interrupted", code, as_json)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))
    print(f"treering: {message}", file=sys.stderr)
    return code


def _open(folder: Path) -> Workspace:
    from treering.workspace import Workspace

    return Workspace(folder)


def _version(ws: Workspace, name: str | None) -> Version | None:
    from treering import registry

    if name == "base":
        return None
    return registry.current(ws) if name is None else registry.get(ws, name)


def _show(result: Any, as_json: bool, lines: list[str]) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    else:
        print("\n".join(lines), flush=True)


def _listening(url: str, as_json: bool) -> None:
    _show({"url": url}, as_json, [f"listening on {url}"])


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _choices(version: Version) -> list[str]:
    return [f"{name}: {c['value']} ({c['reason']})" for name, c in version.manifest.get("choices", {}).items()]


def _matrix(version: Version) -> list[str]:
    matrix = version.manifest["matrix"]
    if not matrix["tasks"]:
        return []
    width = max(6, *map(len, matrix["tasks"])) + 2
    lines = ["scores after each update:", "".join(f"{task:>{width}}" for task in matrix["tasks"])]
    lines += ["".join(f"{_percent(value):>{width}}" for value in row) for row in matrix["R"]]
    summary = {key: value for key, value in version.manifest["summary"].items() if value is not None}
    return [*lines, ", ".join(f"{key.replace('_', ' ')} {_percent(value)}" for key, value in summary.items())]
