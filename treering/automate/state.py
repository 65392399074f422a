"""What the loop must know after a crash or a reboot, in `automation.json`."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from treering.errors import TreeringError
from treering.files import write_file

FILE = "automation.json"
FORMAT = 1

Step = Literal["look", "ingest", "update"]


class State(BaseModel):
    """Changed in place by the loop, and saved before and after everything that takes long."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    format: int = FORMAT
    day: date | None = None
    """The day that `updates` and `seconds` belong to."""
    updates: int = Field(0, ge=0)
    """Updates started in that day, less those that turned out not to run."""
    seconds: float = Field(0.0, ge=0)
    """Seconds that updates ran in that day."""
    running: datetime | None = None
    """Since when an update runs, which its version says, too; still there after a crash, because nobody took it out."""
    pending: str | None = None
    """Why the update that runs, or has to be tried again, was started."""
    pending_row: str | None = None
    """The first row it was started for: once that one waits no more, something else has learned them."""
    failures: dict[Step, int] = {}
    """Failures in a row of each step."""
    retry_at: datetime | None = None
    """Nothing is tried before."""
    stopped: str | None = None
    """Why nothing is tried any more, until the user resumes."""
    held: str | None = None
    """The version whose hold made `suspects`."""
    suspects: list[str] = []
    """Files that are still to be tried one by one."""
    forgot: str | None = None
    """The version whose hold is why the first of them is to be tried with more protection before it is blamed."""
    settled: str | None = None
    """A hash of what waited when the last update left everything as it was: the same is not tried again."""
    schedule: str | None = None
    """The schedule that is followed; another begins anew."""
    scheduled: datetime | None = None
    """The moment up to which it was followed."""

    @classmethod
    def load(cls, root: Path) -> State:
        """The state of the workspace in `root`; a new one if there is none. Raises `TreeringError` if it is damaged."""
        path = root / FILE
        try:
            state = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError) as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise TreeringError(
                f"{path} is damaged ({first}); remove it and run `treering watch --resume`. Only the day's budget and "
                "the failures so far are forgotten; rows and versions do not depend on it"
            ) from None
        if state.format > FORMAT:
            raise TreeringError(f"{path} has format {state.format}, newer than {FORMAT}: update treering")
        return state

    def save(self, root: Path) -> None:
        """Write it, all or nothing."""
        write_file(root / FILE, (self.model_dump_json(indent=1, exclude_defaults=True) + "\n").encode())

    def turn_to(self, day: date) -> None:
        """Begin a new budget if the day is another."""
        if self.day != day:
            self.day, self.updates, self.seconds = day, 0, 0.0
