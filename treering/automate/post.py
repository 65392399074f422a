"""One webhook in a process of its own, which can be ended whatever it waits for; a thread cannot.

It is run as a file and imports nothing of treering, so that it starts at once. The request is JSON on standard input;
what went wrong is said on standard output in words that hold nothing of the address, which may have a key in it.
"""

from __future__ import annotations

import http.client
import json
import sys
import urllib.error
import urllib.request
from typing import Any


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none: the event would be sent on without its body."""


def send(url: str, headers: dict[str, str], body: str, seconds: float) -> str | None:
    """POST it; returns why it failed, None if the answer is a 2xx."""
    try:
        request = urllib.request.Request(url, data=body.encode(), headers=headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP Error {error.code}"
    except urllib.error.URLError as error:
        reason = error.reason
        return f"it cannot be reached ({getattr(reason, 'strerror', None) or type(reason).__name__})"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"it gave no proper answer ({type(error).__name__})"


if __name__ == "__main__":
    failed = send(**json.load(sys.stdin))
    if failed is not None:
        sys.stdout.write(failed)
        sys.exit(1)
