"""What models make of stored rows: how far new ones are from those learned, and which labels look wrong.

The base model tells how far: its features are the same whatever was learned since. The current version tells which
labels: rows that it has not learned, and answers confidently with another label of their task. Both are reports; no row
is refused for them, for a model that is sure and wrong would keep out what it ought to learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.answers import Answerer
from treering.data.example import Example, Message, normalise
from treering.evaluate import evaluate
from treering.features import features
from treering.model import encode
from treering.progress import bar
from treering.scoring import exact_match

if TYPE_CHECKING:
    from torch import Tensor

    from treering.workspace import Workspace

READ = 500
"""Rows of a task that are read on either side, the first by id: ids are hashes, so these are a random draw."""

SURE = 0.8
"""Probability from which on another label is a doubt."""


@dataclass(frozen=True)
class Doubt:
    """A row whose label may be wrong: what it says, and what the version would say, with that one's probability."""

    id: str
    file: str
    line: int
    label: str
    likely: str
    probability: float


class Looks:
    """The current version of `ws`, or the base model, loaded to look at rows."""

    def __init__(self, ws: Workspace, quiet: bool = True) -> None:
        self.ws, self.quiet = ws, quiet
        self.version = registry.current(ws)
        self.loaded = Answerer(ws, self.version)

    def distance(self, waiting: Sequence[str], known: Sequence[str]) -> float | None:
        """How far apart the means of both are, in standard deviations of the rows around them; None: too few rows.

        What chance alone puts between the means of so many rows is taken off, so that equal ones come to about 0.
        """
        sides = [sorted(ids)[:READ] for ids in (waiting, known)]
        if min(map(len, sides)) < 2:
            return None
        one, other = (self._features(ids) for ids in sides)
        within = (_spread(one) + _spread(other)) / (len(one) + len(other) - 2)
        by_chance = within * (1 / len(one) + 1 / len(other))
        between = float((one.mean(0) - other.mean(0)).square().sum())
        return math.sqrt(max(0.0, between - by_chance) / max(within, 1e-12))

    def doubts(self, task: str, waiting: Sequence[str]) -> list[dict[str, Any]] | None:
        """Those of the waiting rows whose label may be wrong, the surest first; None: the version cannot judge them."""
        metrics = self.version.manifest["metrics"] if self.version else {}
        if metrics.get(task) != "exact_match":
            return None
        examples = self.ws.catalog.examples(sorted(waiting)[:READ])
        labels = {example.label for example in examples.values()} | self._learned_labels(task)
        said = self._answers(task, list(examples.values()), metrics, f"reading {task}")
        others = {
            id: Example((*examples[id].prompt, Message("assistant", answer.strip())))
            for id, (answer, _) in said.items()
            if not exact_match(answer, examples[id].answer) and normalise(answer) in labels
        }
        sure = self._answers(task, list(others.values()), metrics, f"reading {task} again")
        places = {row["id"]: row for row in self.ws.catalog.rows(list(others))}
        found = [
            Doubt(id, places[id]["file"], places[id]["line"], examples[id].answer, other.answer, sure[other.id][1])
            for id, other in others.items()
            if sure[other.id][1] >= SURE
        ]
        return [asdict(doubt) for doubt in sorted(found, key=lambda doubt: (-doubt.probability, doubt.id))]

    def _learned_labels(self, task: str) -> set[str]:
        learned = registry.consumed(self.ws, self.version).intersection(self.ws.catalog.train_ids(task))
        return {example.label for example in self.ws.catalog.examples(sorted(learned)).values()}

    def _answers(
        self, task: str, examples: Sequence[Example], metrics: Mapping[str, str], title: str
    ) -> dict[str, tuple[str, float]]:
        """What is answered to each, and the probability of the answer it has, by its id."""
        model, tokenizer, config = self.loaded.model, self.loaded.tokenizer, self.loaded.config
        pairs = [(example, task) for example in examples]
        results = evaluate(model, tokenizer, pairs, metrics, config, title=title, quiet=self.quiet)
        tokens = [len(encode(tokenizer, example, last_only=True).answers) for example in examples]
        return {
            result.id: (result.prediction, math.exp(-result.loss * count))
            for result, count in zip(results, tokens, strict=True)
        }

    def _features(self, ids: Sequence[str]) -> Tensor:
        prompts = [example.prompt for example in self.ws.catalog.examples(ids).values()]
        with bar("reading prompts", len(prompts), self.quiet) as advance:
            return features(self.loaded.model, self.loaded.tokenizer, prompts, self.loaded.config, advance=advance)


def _spread(rows: Tensor) -> float:
    """The squared distances of rows from their mean, summed."""
    return float((rows - rows.mean(0)).square().sum())
