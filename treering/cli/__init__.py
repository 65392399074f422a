"""The commands: parse, call, print. Heavy imports stay inside, so that `--help` answers at once."""

from __future__ import annotations

import gc
import json
import sys

# Importing them adds their commands to the program, in the order in which `--help` lists them.
# isort: off
from treering.cli import updates, data, quarantine, forgetting, versions, answers, serving, bench  # noqa: F401

# isort: on
from treering.cli.common import app

__all__ = ["app", "main", "run"]

INTERRUPTED = 130  # What typer makes of Ctrl-C, as shells do.

_ABOUT_ROWS = ("ingest", "data", "quarantine", "forget")
"""Commands that load no model."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 runtime error, 2 held by the gate, 3 usage or configuration error, 130 interrupted.
    """
    code = run(sys.argv[1:])
    gc.freeze()  # Else Python looks through all that torch has made once more as it ends, for a second and more.
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    from treering.errors import LESS_TO_LEARN, LESS_TO_TAKE, TreeringError, first_line, ran_out_of_memory

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
        if ran_out_of_memory(error):
            way_out = LESS_TO_TAKE if arguments[0] in _ABOUT_ROWS else LESS_TO_LEARN
            return _fail(f"out of memory ({first_line(error)}). {way_out}", 1, as_json)
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
