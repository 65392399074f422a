"""A process that is asked on standard input and answers on standard output."""

from __future__ import annotations

import os
from typing import TextIO


def own_output() -> TextIO:
    """Standard output for what this process has to say; what libraries print goes to standard error from now on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out
