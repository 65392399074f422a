"""Recall: what rows like the prompt were answered has part in the choice of each token of an answer.

A linear discriminant over all labels ever learned (`treering.router`) forgets nothing, but it knows labels alone; the
model can say anything, but forgets. Their chances are multiplied (a product of experts, Hinton 2002), each with a small
chance of being wrong altogether, as long as what is written begins like a label that the prompt recalls; after that
the model answers alone. So the past has part in each choice, as in kNN-LM (Khandelwal et al. 2020, arXiv:1911.00172),
with means of classes in place of a store of rows. A prompt unlike all that was learned is none of the adapter's
business: the base model answers it, which has forgotten nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from treering.data.example import Example, Message
from treering.model import encode
from treering.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.config import Config
    from treering.registry import Version

MOST = 16
"""Classes that a prompt may recall, the likeliest ones."""

LEAST = 1e-4
"""Chance that a label has at least to be among them."""

DOUBT = 0.005
"""Chance that the answer is none of those labels, at least."""

FORGOTTEN = 0.02
"""Chance that the model no longer knows: it may be as sure of what it learned last as it once was of what is right."""


@dataclass
class Recalled:
    """The labels that may come, as a tree of their tokens with end marks: which may be next, and how likely.

    `doubt` is the chance that the answer is none of them.
    """

    doubt: float
    shares: dict[int, float] = field(default_factory=dict)
    longer: dict[int, Recalled] = field(default_factory=dict)

    def score(self, token: int, chance: float) -> float:
        """The logarithm of how likely `token` is by both, where the model gives it this `chance`; not normalised."""
        share = self.shares.get(token, 0.0) / math.fsum(self.shares.values())
        either = (1 - FORGOTTEN) * chance + FORGOTTEN * share
        return math.log(max(either * ((1 - self.doubt) * share + self.doubt * chance), 1e-30))

    def blended(self, logits: Tensor) -> Tensor:
        """The `score` of all tokens, where the model has these `logits` `[vocabulary]`."""
        chances, shares = logits.softmax(-1), torch.zeros_like(logits)
        known = torch.tensor(list(self.shares.values()), device=logits.device)
        shares[list(self.shares)] = known / known.sum()
        either = (1 - FORGOTTEN) * chances + FORGOTTEN * shares
        return (either * ((1 - self.doubt) * shares + self.doubt * chances)).clamp_min(1e-30).log()

    def add(self, tokens: Sequence[int], chance: float) -> None:
        """One more label that begins with what this stands behind."""
        place = self
        for token in tokens:
            place.shares[token] = place.shares.get(token, 0.0) + chance
            place = place.longer.setdefault(token, Recalled(self.doubt))

    @property
    def tokens(self) -> set[int]:
        """All that stand in the tree."""
        return set(self.shares).union(*(longer.tokens for longer in self.longer.values()))

    def after(self, token: int) -> Recalled | None:
        """What may come behind `token`; None: no label goes on so, and the model is on its own."""
        found = self.longer.get(token)
        return found if found is not None and found.shares else None


class Recall:
    """Works where answers are written, not where rows are learned; needs a `router` of what was learned."""

    def __init__(self, config: Config, router: Router | None = None) -> None:
        self.weight = config.recall.weight
        self.router = router
        self._fallback = config.recall.fallback
        self._tokens: dict[str, list[int]] = {}

    @property
    def falls_back(self) -> bool:
        """Whether the base model answers what is unlike all that was learned; only where that is known."""
        return self._fallback and self.router is not None and self.router.whole

    def of(self, vectors: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[Recalled | None]:
        """What prompts with these features `[prompts, size]` recall; None where nothing."""
        router = self.router
        assert router is not None
        found = router.like(vectors, self.weight, MOST)
        return [self._recalled(chances, router.answers, tokenizer) for chances in found]

    def _recalled(
        self, chances: dict[str, float], answers: Mapping[str, str], tokenizer: PreTrainedTokenizerBase
    ) -> Recalled | None:
        labels = {name: chance for name, chance in chances.items() if name in answers and chance > LEAST}
        known = math.fsum(labels.values())
        if known <= DOUBT:
            return None
        found = Recalled(max(1 - known, DOUBT))
        for name, chance in labels.items():
            found.add(self._written(answers[name], tokenizer), chance)
        return found

    def _written(self, label: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens of an answer that is this label, with its end mark."""
        if label not in self._tokens:
            row = encode(tokenizer, Example((Message("user", "?"), Message("assistant", label))))
            self._tokens[label] = [row.ids[place] for place in row.answers]
        return self._tokens[label]


def of(model: PreTrainedModel) -> Recall | None:
    """The recall of `model`; None: it answers alone."""
    return cast("Recall | None", getattr(model, "treering_recall", None))


def attach(model: PreTrainedModel, recall: Recall | None) -> None:
    """Have `model` answer with `recall` from now on, or alone."""
    cast(Any, model).treering_recall = recall


def load(version: Version, router: Router | None = None) -> Recall:
    """The recall of `version`, as it was judged, with its `router` if that was read already."""
    from treering.config import Config

    # Its own settings alone: others may be half of what was set, for what starts processes is kept apart.
    config = Config.model_validate({"recall": version.manifest["config"].get("recall", {})})
    return Recall(config, router or Router.load(version.folder))
