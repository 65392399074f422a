"""The server: answers, versions on trial, keys, feedback."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treering.cli.common import HERE, AsJson, Folder, app, opened, output

feedback = typer.Typer(help="What users said of answers.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(feedback, name="feedback")
keys = typer.Typer(help="Keys for the server.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys, name="keys")

Host = Annotated[str, typer.Option(help="Address to listen on; others than loopback need a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids, or `all` that make a row.")]


@app.command()
def serve(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Answer over an OpenAI-compatible API, always with the current version."""
    _serve(workspace, host, port, as_json)


@app.command("run")
def serve_and_update(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Serve and update by itself, in one process: `serve` and `watch` together."""
    _serve(workspace, host, port, as_json, updates=True)


def _serve(workspace: Path, host: str, port: int, as_json: bool, *, updates: bool = False) -> None:
    from treering.serve.run import serve as run_server

    def ready(url: str) -> None:
        output({"url": url}, as_json, [f"listening on {url}"])

    run_server(opened(workspace), host, port, updates=updates, ready=ready)


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
    ws = opened(workspace)
    if off:
        trial.stop(ws)
    elif version is not None:
        trial.start(ws, version, share, shadow=shadow, force=force)
    found = figures.report(ws)
    output(found, as_json, figures.describe(found))


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

    key, secret = store.create(opened(workspace), name, scope, requests_per_minute)
    output({"id": key.id, "name": key.name, "scope": key.scope, "key": secret}, as_json, [secret, f"its id: {key.id}"])


@keys.command("list")
def keys_list(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """The keys there are, without what is secret."""
    from treering.serve import keys as store

    found = [key.model_dump(exclude={"sha256"}) for key in store.read(opened(workspace).root)]
    lines = [f"{key['id']}  {key['scope']:5}  {key['created']}  {key['name']}" for key in found]
    output({"keys": found}, as_json, lines or ["no key yet"])


@keys.command("revoke")
def keys_revoke(
    id: Annotated[str, typer.Argument(metavar="ID")], workspace: Folder = HERE, as_json: AsJson = False
) -> None:
    """Take a key away; a running server refuses it at once."""
    from treering.serve import keys as store

    ws = opened(workspace)
    key = store.revoke(ws, id)
    lines = [f"{key.id} ({key.name or 'no name'}) is revoked"]
    if not store.read(ws.root):
        lines.append("it was the last: until another is made, a server lets nobody in")
    output({"revoked": key.id}, as_json, lines)


@feedback.command("list")
def feedback_list(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """What waits for a decision, and how much was decided."""
    from treering import feedback as store

    entries = store.read(opened(workspace))
    waiting = [entry for entry in entries if entry.state == "waiting"]
    counts = {state: sum(entry.state == state for entry in entries) for state in ("accepted", "rejected")}
    lines = [
        f"{e.id}  {e.time}  {e.feedback.rating or '-':4}  {e.feedback.messages[-1].get('content')!r}: "
        f"{e.feedback.answer!r}" + (f" -> {e.feedback.correction!r}" if e.feedback.correction else "")
        for e in waiting
    ]
    lines.append(f"{len(waiting)} waiting, {counts['accepted']} accepted, {counts['rejected']} rejected")
    output({"waiting": [entry.model_dump(mode="json") for entry in waiting], **counts}, as_json, lines)


@feedback.command("accept")
def feedback_accept(ids: Ids, workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """Make rows of feedback: files in the inbox, which the next update reads and checks."""
    from treering import feedback as store

    ws = opened(workspace)
    chosen = [entry.id for entry in store.waiting(store.read(ws))] if ids == ["all"] else ids
    files = [str(path) for path in store.accept(ws, chosen)]
    output({"accepted": len(chosen), "files": files}, as_json, [f"{len(chosen)} rows", *files])


@feedback.command("reject")
def feedback_reject(ids: Ids, workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """Decide that feedback makes no rows."""
    from treering import feedback as store

    ws = opened(workspace)
    chosen = [e.id for e in store.read(ws) if e.state == "waiting"] if ids == ["all"] else ids
    store.reject(ws, chosen)
    output({"rejected": len(chosen)}, as_json, [f"{len(chosen)} rejected"])
