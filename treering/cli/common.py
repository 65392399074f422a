"""What the commands share: the program itself, options that all have, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

Folder = Annotated[Path, typer.Option("--workspace", "-w", metavar="DIR", help="The workspace's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
HERE = Path()


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


def opened(folder: Path) -> Workspace:
    """The workspace in `folder`. Raises `UsageError` if it is none."""
    from treering.workspace import Workspace

    return Workspace(folder)


def find_version(ws: Workspace, name: str | None) -> Version | None:
    """The version of that name, or `current`; None: the base model."""
    from treering import registry

    if name == "base":
        return None
    return registry.current(ws) if name is None else registry.get(ws, name)


def output(result: Any, as_json: bool, lines: list[str]) -> None:
    """One JSON object, or lines to read."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    else:
        print("\n".join(lines), flush=True)


def percent(value: float | None) -> str:
    """A fraction in points."""
    return "-" if value is None else f"{100 * value:.1f}"


def choices(version: Version) -> list[str]:
    """What was chosen automatically, and why."""
    found = version.manifest.get("choices", {}).items()
    return [f"{name}: {_short(choice['value'])} ({choice['reason']})" for name, choice in found]


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def needs(cost: Mapping[str, Any]) -> str:
    """Time and memory, of what an update took or will."""
    parts = [f"{cost['total_seconds']:,.0f} s ({cost['seconds']:,.0f} s of training)"]
    parts += [f"{cost['peak_memory_mb']:,.0f} MB of memory"]
    gpu = cost["peak_gpu_memory_mb"]
    return ", ".join(parts if gpu is None else [*parts, f"{gpu:,.0f} MB of GPU memory"])


def cost(version: Version) -> list[str]:
    """What the update took, and what `treering plan` had said, if it was asked."""
    estimate = version.manifest["estimate"]
    return [f"took: {needs(version.manifest['cost'])}"] + ([f"planned: {needs(estimate)}"] if estimate else [])


def matrix(version: Version) -> list[str]:
    """The score matrix and its measures."""
    matrix = version.manifest["matrix"]
    if not matrix["tasks"]:
        return []
    width = max(6, *map(len, matrix["tasks"])) + 2
    lines = ["scores after each update:", "".join(f"{task:>{width}}" for task in matrix["tasks"])]
    lines += ["".join(f"{percent(value):>{width}}" for value in row) for row in matrix["R"]]
    summary = {key: value for key, value in version.manifest["summary"].items() if value is not None}
    return [*lines, ", ".join(f"{key.replace('_', ' ')} {percent(value)}" for key, value in summary.items())]
