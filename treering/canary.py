"""Which version is on trial, and how: a share of the traffic (canary), or asked in silence (shadow).

`canary.json` is beside the versions and says what a running server does; what came of it is in `figures.py`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from treering import registry
from treering.errors import TreeringError, UsageError
from treering.files import write_file

if TYPE_CHECKING:
    from treering.workspace import Workspace

FILE = "canary.json"
FORMAT = 1
SHARE = 0.1

Mode = Literal["canary", "shadow"]


class Canary(BaseModel):
    """A version on trial. Once `ended` is there, it is over, and `reason` says why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    version: str = Field(pattern=r"^v[1-9][0-9]*$")
    mode: Mode = "canary"
    share: float | None = Field(None, gt=0, le=1)
    """Of the requests that name `current`, the share that it answers; None in shadow."""
    since: datetime
    ended: datetime | None = None
    reason: str | None = None


def start(ws: Workspace, name: str, share: float | None = None, *, shadow: bool = False, force: bool = False) -> Canary:
    """Put a version on trial, in place of any other. A running server follows within a second.

    Raises `UsageError` for one that is current, or that the gate held: users meet such a one only with `force`.
    """
    if share is not None and shadow:
        raise UsageError("give --share or --shadow, not both: in shadow nobody is answered by the version")
    if share is not None and not 0 < share <= 1:
        raise UsageError(f"--share {share:g} is no share of the traffic; give more than 0 and at most 1, such as 0.1")
    if ws.config().serve.max_loaded_versions < 2:
        raise UsageError("serve.max_loaded_versions is 1, and two versions have to answer at once; set it to 2 or more")
    version = registry.get(ws, name).check()  # Hashing may take long; nobody has to wait for it.
    with ws.changing("canary"):
        here = registry.current(ws)
        if here is not None and here.name == version.name:
            raise UsageError(f"{version.name} is current and answers every request already; name another version")
        if not (version.promote or shadow or force):
            raise UsageError(
                f"{version.name} was held by the gate: {version.summary}. Use --shadow, which no user meets, or --force"
            )
        made = Canary(
            version=version.name,
            mode="shadow" if shadow else "canary",
            share=None if shadow else share or SHARE,
            since=_now(),
        )
        _write(ws.root, made)
    return made


def stop(ws: Workspace) -> Canary | None:
    """End it; returns what was on trial last, if anything was. A damaged file goes."""
    with ws.changing("canary"):
        try:
            found = read(ws.root)
        except TreeringError:
            (ws.root / FILE).unlink()
            return None
        return _ended(ws.root, found, "turned off")


def promoted(root: Path, name: str) -> None:
    """`name` becomes current, which ends its trial. The caller holds the lock. A damaged file is left to `read`."""
    try:
        found = read(root)
    except TreeringError:
        return
    if found is not None and found.version == name:
        _ended(root, found, f"{name} became current")


def read(root: Path) -> Canary | None:
    """What is or was last on trial. Raises `TreeringError` if the file is damaged."""
    path = root / FILE
    try:
        found = Canary.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise TreeringError(
            f"{path} is damaged ({first}), so no version is on trial; run `treering canary --off`, or start it again"
        ) from None
    if found.format > FORMAT:
        raise TreeringError(f"{path} has format {found.format}, newer than {FORMAT}: update treering")
    return found


def running(root: Path) -> Canary | None:
    """What is on trial now, if anything is. Raises `TreeringError` as `read` does."""
    found = read(root)
    return None if found is None or found.ended else found


def _ended(root: Path, found: Canary | None, reason: str) -> Canary | None:
    if found is None or found.ended:
        return found
    over = found.model_copy(update={"ended": _now(), "reason": reason})
    _write(root, over)
    return over


def _write(root: Path, canary: Canary) -> None:
    write_file(root / FILE, (canary.model_dump_json(indent=1, exclude_none=True) + "\n").encode())


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
