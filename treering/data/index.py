"""Which stored rows may be like a new one: MinHash signatures in bands, sorted on disk.

Signatures are MinHash (Broder 1997), rows that share a band are candidates (locality-sensitive hashing, Indyk and
Motwani 1998). The bands of many rows are one sorted array, a run; a lookup is a binary search in each run, and runs of
like size are merged (log-structured merge, O'Neil et al. 1996). Runs lie on disk and are mapped, so that neither
opening an index nor its memory grows with what is stored.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from treering.files import fsync_folder

HASHES = 64
"""Numbers of a signature; its estimate of a Jaccard index is off by 0.05 at 0.8 (one standard deviation)."""

BANDS, WIDTH = 12, 5
"""Of rows whose Jaccard index is 0.8, 99.2% share a band; of those with 0.5, 32%."""

CROWD = 32
"""Rows of one band that are looked at, the last ones: what hundreds of rows share tells none apart."""

MARGIN = 0.15
"""How far below what is asked for an estimate may lie."""

_SEED = 1
_FILES = ("keys", "places", "rows", "sketches")

Signatures = NDArray[np.uint32]


@dataclass(frozen=True)
class Run:
    """The bands of some signatures: sorted `keys` and the place of the signature that has each (`places`).

    `rows` are the numbers of the rows they are of, sorted, and `sketches` `[signatures, HASHES]` their low bytes. A row
    has a signature for each thing that it says, the first of all that it says. `name` is the folder's on disk; empty:
    it is in memory only.
    """

    keys: NDArray[np.uint64]
    places: NDArray[np.uint32]
    rows: NDArray[np.uint32]
    sketches: NDArray[np.uint8]
    name: str = ""

    @classmethod
    def of(cls, signatures: Signatures, rows: NDArray[np.uint32]) -> Run:
        """Of new rows, whose numbers rise."""
        places = np.repeat(np.arange(len(rows), dtype=np.uint32), BANDS)
        return cls._sorted(_keys(signatures), places, rows, signatures.astype(np.uint8))

    @classmethod
    def merged(cls, one: Run, later: Run) -> Run:
        """Both; `later` has the higher row numbers."""
        keys, rows, sketches = (
            np.concatenate([getattr(one, key), getattr(later, key)]) for key in ("keys", "rows", "sketches")
        )
        places = np.concatenate([one.places, later.places + np.uint32(len(one.rows))])
        return cls._sorted(keys, places, rows, sketches)

    def without(self, rows: Sequence[int]) -> Run:
        """What is left when these rows go."""
        left = ~np.isin(self.rows, rows)
        others = left[self.places]
        places = (np.cumsum(left) - 1).astype(np.uint32)[self.places[others]]
        return Run(self.keys[others], places, self.rows[left], self.sketches[left])

    @classmethod
    def _sorted(
        cls,
        keys: NDArray[np.uint64],
        places: NDArray[np.uint32],
        rows: NDArray[np.uint32],
        sketches: NDArray[np.uint8],
    ) -> Run:
        order = np.argsort(keys, kind="stable")  # Stable: of one key the rows stay in the order they came.
        return cls(keys[order], places[order], rows, sketches)

    def near(
        self, signatures: Signatures, of: NDArray[np.uint32], least: float
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Pairs of one of the rows that `signatures` are `of` and a row of this run, whose likeness may be `least`.

        At least one of the two has to be alike as a whole: by the first of its signatures.
        """
        asked = _keys(signatures)
        order = np.argsort(asked)  # Neighbours are found in neighbouring pages.
        begins, ends = (np.searchsorted(self.keys, asked[order], side) for side in ("left", "right"))
        counts = np.minimum(ends - begins, CROWD)
        total = int(counts.sum())
        if not total:
            return np.zeros(0, np.int64), np.zeros(0, np.uint32)
        starts = np.repeat(ends - counts, counts)
        within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        places = np.repeat(order // BANDS, counts).astype(np.int64)
        pairs = np.unique((places << 32) | self.places[starts + within].astype(np.int64))
        places, found = pairs >> 32, pairs & 0xFFFFFFFF
        likeness = (self.sketches[found] == signatures[places].astype(np.uint8)).mean(1)
        taken = (likeness >= least) & (_is_first(of, places) | _is_first(self.rows, found))
        return of[places[taken]], self.rows[found[taken]]

    def save(self, folder: Path) -> None:
        """Write it there; on disk once this returns."""
        folder.mkdir(parents=True)
        for name in _FILES:
            with (folder / f"{name}.npy").open("wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        fsync_folder(folder)

    @classmethod
    def load(cls, folder: Path) -> Run:
        """What `save` wrote, mapped. Raises `OSError` or `ValueError` where it is not whole."""
        try:
            found = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _FILES]
        except EOFError:
            raise ValueError(f"{folder} has an empty file") from None
        run = cls(found[0], found[1], found[2], found[3], folder.name)
        if len(run.keys) != BANDS * len(run.rows) or run.sketches.shape != (len(run.rows), HASHES):
            raise ValueError(f"{folder} is not whole")
        return run


class Index:
    """The runs of a folder, those with the given `names`. What is added is in memory until `save`.

    Raises `OSError` or `ValueError` where one is missing or damaged; all can be made again from the rows.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self.runs = [Run.load(folder / name) for name in names]

    def near(self, signatures: Signatures, least: float, of: Sequence[int] | None = None) -> Iterator[tuple[int, int]]:
        """Pairs of a row that `signatures` are `of` and a stored one that may be alike by `least` (Jaccard index).

        None: each signature is of a row of its own, which is named by its place.
        """
        numbers = _numbers(signatures, of)
        for run in self.runs:
            for row, stored in zip(*run.near(signatures, numbers, least - MARGIN), strict=True):
                yield int(row), int(stored)

    def add(self, signatures: Signatures, rows: Sequence[int]) -> None:
        """Add rows, whose numbers are higher than all before; one that says several things stands there as often."""
        if not len(rows):
            return
        self.runs.append(Run.of(signatures, np.array(rows, np.uint32)))
        while len(self.runs) > 1 and len(self.runs[-2].rows) <= 2 * len(self.runs[-1].rows):
            later, one = self.runs.pop(), self.runs.pop()
            self.runs.append(Run.merged(one, later))

    def drop(self, rows: Sequence[int]) -> None:
        """Let go of these rows."""
        left = [run.without(rows) if np.isin(run.rows, rows).any() else run for run in self.runs]
        self.runs = [run for run in left if len(run.rows)]

    def save(self) -> list[str]:
        """Write what is in memory only; returns the names of all runs, of which none ever comes again."""
        for at, run in enumerate(self.runs):
            if not run.name:
                name = secrets.token_hex(8)
                run.save(self.folder / name)
                self.runs[at] = Run.load(self.folder / name)
        if self.folder.is_dir():
            fsync_folder(self.folder)
        return [run.name for run in self.runs]


def within(signatures: Signatures, least: float, of: Sequence[int] | None = None) -> Iterator[tuple[int, int]]:
    """Pairs of the rows that `signatures` are `of`, as in `Index.near`, that may be alike, the later first."""
    numbers = _numbers(signatures, of)
    run = Run.of(signatures, numbers)
    for row, other in zip(*run.near(signatures, numbers, least - MARGIN), strict=True):
        if other < row:
            yield int(row), int(other)


def signatures(sets: Sequence[Iterable[str]]) -> Signatures:
    """MinHash signatures of sets of words, `[sets, HASHES]`."""
    if not sets:
        return np.zeros((0, HASHES), np.uint32)
    return np.array(RMinHash.digests_from_token_sets([list(one) for one in sets], HASHES, _SEED), np.uint32)


def clear(folder: Path, keep: Iterable[str]) -> None:
    """Remove all runs but those to keep: what a crash left, and what was merged."""
    if folder.is_dir():
        for run in set(os.listdir(folder)) - set(keep):
            shutil.rmtree(folder / run)


def _numbers(signatures: Signatures, of: Sequence[int] | None) -> NDArray[np.uint32]:
    return np.arange(len(signatures), dtype=np.uint32) if of is None else np.array(of, np.uint32)


def _is_first(rows: NDArray[np.uint32], places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the `places` in sorted `rows` are the first of their row."""
    first: NDArray[np.bool_] = (places == 0) | (rows[places] != rows[places - 1])
    return first


def _keys(signatures: Signatures) -> NDArray[np.uint64]:
    """A key for each band of each signature, row after row; the band is part of it."""
    keys = np.empty((len(signatures), BANDS), np.uint64)
    for band in range(BANDS):
        key = np.full(len(signatures), band + 1, np.uint64)
        for at in range(band * WIDTH, (band + 1) * WIDTH):
            key ^= signatures[:, at].astype(np.uint64)
            key *= np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        keys[:, band] = key
    return keys.ravel()
