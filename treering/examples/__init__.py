"""The packaged example stream: a shop whose support desk adds product lines."""

from pathlib import Path


def path() -> Path:
    """The folder that holds the stream's task folders."""
    return Path(__file__).parent / "shop"
