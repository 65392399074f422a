"""Who answers a prompt, and what it recalls: both follow from what the base model makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treering import experts
from treering.features import features
from treering.methods import recall
from treering.methods.recall import Recalled
from treering.router import OWN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.config import Config
    from treering.data.example import Message
    from treering.readings import Reading
    from treering.stop import Stop


@dataclass(frozen=True)
class Guide:
    """For a prompt: the `expert` that answers it (None: the base model), and what it recalls."""

    expert: str | None = OWN
    recalled: Recalled | None = None


def guides(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    config: Config,
    stop: Stop | None = None,
    reading: Reading | None = None,
) -> list[Guide]:
    """A guide a prompt; nothing is read where `model` has neither experts nor recall.

    Raises as `features` does.
    """
    known, past = experts.of(model), recall.of(model)
    if known is None and past is None:
        return [Guide()] * len(prompts)
    vectors = features(model, tokenizer, prompts, config, stop=stop, reading=reading)
    router = known.router if known else past.router if past and past.falls_back else None
    chosen = router.route(vectors) if router else [OWN] * len(prompts)
    recalled = past.of(vectors, tokenizer) if past else [None] * len(prompts)
    return [Guide(*pair) for pair in zip(chosen, recalled, strict=True)]
