"""Tokens read as a tree: what rows have in common is read once, and what was read is kept for what comes after it.

A row is a path from the root. Each pass reads the tokens that are new on its paths, in one flat sequence without
padding; keys and values of earlier ones are at hand. So a few known answers can be tried after every prompt for the
price of their own tokens. (Tree attention: Miao et al. 2023, SpecInfer, arXiv:2305.09781; prefixes in a tree: Zheng et
al. 2023, SGLang, arXiv:2312.07104.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from treering import attention
from treering.model import compute, lean_output, logits_at, pad, precision, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config

ROOT = -1

Path = list[int]
"""Numbers of the tokens on a way down the tree, those that all ways begin with left out."""


@dataclass
class _Row:
    """What a pass reads after one path: `keys` are the tokens there are, the first `length` on the path, then below it.

    `branches` are ways down, as places in `keys`; `made` says which tokens are new: the last of so many of a branch.
    """

    keys: Path
    length: int
    branches: list[list[int]] = field(default_factory=list)
    made: list[tuple[int, int]] = field(default_factory=list)


class Tree:
    """Tokens that `model` has read. `pad_id` is any token; with `keep` there will be more passes than the first.

    Of the tokens in `watched` it is known how likely they are after each where that was asked for (`log_chance`).

    Where the model's attention is not ours (`treering.attention`), nothing is shared or kept, and tokens are read again
    with all that comes before them: slower, with the same results.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Config,
        pad_id: int,
        *,
        keep: bool = True,
        watched: Iterable[int] = (),
    ) -> None:
        self.keeps = model.config._attn_implementation == attention.NAME
        self.likeliest: dict[int, int] = {}
        """The token that is likeliest after a token, where it was asked for."""
        self._watched = sorted(set(watched))
        self._column = {token: at for at, token in enumerate(self._watched)}
        self._logs: dict[int, tuple[float, Tensor]] = {}
        self._model, self._pad_id, self._dtype = model, pad_id, precision(config)[0]
        self._kept = attention.Kept() if self.keeps and keep else None
        self._prefix: list[int] = []
        self._tokens: list[int] = []
        self._after: dict[tuple[int, int], int] = {}

    def begin(self, rows: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> Tensor:
        """The first pass, over the token ids of `rows`.

        Returns float32 logits `[all wanted, vocabulary]` after the positions `wanted` of each row, in their order. Of
        those, too, the likeliest tokens are known afterwards.
        """
        if self.keeps:
            self._prefix = _common(rows, min(min(places) for places in wanted))
        begun = len(self._prefix)
        self._tokens = list(self._prefix)
        made = self._grow([([], [row[begun:]]) for row in rows])
        paths = [self.path(row) for row in rows]
        asked = [path[place - begun] for path, places in zip(paths, wanted, strict=True) for place in places]
        found = sorted(set(asked))
        logits = self._read(made, begun, found)
        at = {token: place for place, token in enumerate(found)}
        return logits if asked == found else logits[[at[token] for token in asked]]

    def go_on(self, asked: Iterable[tuple[Path, Sequence[Sequence[int]]]]) -> dict[int, Tensor]:
        """Read, in one pass, token ids that may come after paths, several ways each.

        What is likeliest after each of them is known then. Returns float32 logits `[vocabulary]` after those that were
        new, by their numbers.
        """
        start = len(self._tokens)
        made = self._grow(asked)
        new = range(start, len(self._tokens))
        return dict(zip(new, self._read(made, 0, new), strict=True)) if new else {}

    def path(self, row: Sequence[int]) -> Path:
        """The way of token ids that were read."""
        found: Path = []
        for token in row[len(self._prefix) :]:
            found.append(self._after[found[-1] if found else ROOT, token])
        return found

    def after(self, path: Path, token: int) -> int | None:
        """The token's number there, if it was read and what is likeliest after it is known."""
        found = self._after.get((path[-1], token))
        return found if found in self.likeliest else None

    def log_chance(self, number: int, token: int) -> float:
        """The logarithm of the chance of `token`, watched or the likeliest one, after the token of that number."""
        best, watched = self._logs[number]
        return best if token == self.likeliest[number] else float(watched[self._column[token]])

    def _grow(self, asked: Iterable[tuple[Path, Sequence[Sequence[int]]]]) -> list[_Row]:
        """Give new tokens their numbers, in the order of the rows' `made`."""
        rows, start = [], len(self._tokens)
        for path, ways in asked:
            row, places = _Row(list(path), len(path)), dict[int, int]()
            for way in ways:
                last, branch = path[-1] if path else ROOT, list[int]()
                for token in way:
                    known = self._after.get((last, token))
                    if known is not None and known < start and known not in self.likeliest:
                        known = None  # A longer prompt has it, where nothing was asked of it. It is read once more.
                    number = len(self._tokens) if known is None else known
                    if number not in places:
                        places[number] = len(row.keys)
                        row.keys.append(number)
                    branch.append(places[number])
                    if known is None:
                        self._after[last, token] = number
                        self._tokens.append(token)
                        row.made.append((len(row.branches), len(branch)))
                    last = number
                row.branches.append(branch)
            rows += [row] if row.made else []
        return rows

    @torch.no_grad()
    def _read(self, rows: Sequence[_Row], begun: int, wanted: Sequence[int]) -> Tensor:
        """Logits after the tokens `wanted`, all of them new."""
        lean_output(self._model)
        with compute(self._model.device, self._dtype):
            logits = self._along(rows, begun, wanted) if self.keeps else self._again(rows, wanted)
        self.likeliest.update(zip(wanted, logits.argmax(-1).tolist(), strict=True))
        if self._watched:
            total = logits.logsumexp(-1, keepdim=True)
            best, watched = (logits.amax(-1, keepdim=True) - total)[:, 0], (logits[:, self._watched] - total).cpu()
            self._logs.update(zip(wanted, zip(best.tolist(), watched, strict=True), strict=True))
        return logits

    def _along(self, rows: Sequence[_Row], begun: int, wanted: Sequence[int]) -> Tensor:
        count = begun + sum(len(row.made) for row in rows)
        start, longest = len(self._tokens) - count, max(len(row.made) for row in rows)
        keys = np.zeros((len(rows), max(len(row.keys) for row in rows)), np.int64)
        queries = np.zeros((len(rows), longest), np.int64)
        hidden = np.ones((len(rows), 1, longest, keys.shape[1]), np.bool_)
        places, own = list(range(begun)), list[int]()
        for at, row in enumerate(rows):
            keys[at, : len(row.keys)] = row.keys
            branches = [np.array(branch) for branch in row.branches]
            hidden[at, 0, :, : row.length] = False
            hidden[at, 0, len(row.made) :, 0] = False  # Of padding, which has to see something.
            for new, (branch, depth) in enumerate(row.made):
                queries[at, new] = len(places)
                hidden[at, 0, new, branches[branch][:depth]] = False
                places.append(len(self._prefix) + row.length + depth - 1)
                own.append(at * longest + new)
        device = self._model.device
        layout = attention.Paths(
            len(self._prefix),
            begun,
            torch.from_numpy(keys).to(device),
            torch.from_numpy(queries).to(device),
            torch.from_numpy(hidden).to(device),
            torch.tensor(own, device=device),
            self._kept,
        )
        inputs = {
            "input_ids": torch.tensor([self._tokens[start:]], device=device),
            "position_ids": torch.tensor([places], device=device),
        }
        return run(self._model, inputs, layout, torch.tensor(wanted, device=device) - start)

    def _again(self, rows: Sequence[_Row], wanted: Sequence[int]) -> Tensor:
        first: dict[int, int] = {}
        ways = [
            row.keys[: row.length] + [row.keys[place] for place in branch] for row in rows for branch in row.branches
        ]
        width = max(map(len, ways))
        for at, way in enumerate(ways):
            for place, number in enumerate(way):
                first.setdefault(number, at * width + place)
        inputs = pad([[self._tokens[number] for number in way] for way in ways], self._pad_id)
        ids, mask = (inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask"))
        return logits_at(self._model, ids, mask, torch.tensor([first[number] for number in wanted]).to(ids.device))


def _common(rows: Sequence[Sequence[int]], limit: int) -> list[int]:
    """What all `rows` begin with, `limit` tokens at most."""
    first, last = min(map(tuple, rows)), max(map(tuple, rows))  # By their order, all others lie between these.
    alike = (at for at, (a, b) in enumerate(zip(first[:limit], last, strict=False)) if a != b)
    return list(first[: next(alike, min(limit, len(first), len(last)))])
