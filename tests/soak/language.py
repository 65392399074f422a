"""A small world to learn: parts that break, and the desk each belongs to; and a tiny model that knows its language."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

from treering.testing import tiny_model

Row = dict[str, str]

DESKS = ("north", "south", "garden", "harbour", "tower", "bridge", "mill", "quarry")
SENTENCES = (
    "my {} is {} since {}",
    "the {} was {} again on {}",
    "please look at the {}, it is {} since {}",
    "after the storm the {} came back {} on {}",
    "who can help, our {} has been {} from {} on",
    "our new {} arrived {} last {}",
)
STATES = ("broken", "loud", "bent", "wet", "stuck", "cold", "loose", "late", "dirty", "cracked")
DAYS = ("monday", "tuesday", "friday", "sunday", "easter", "june", "july", "noon", "spring", "winter")
STEPS, RATE, BATCH = 400, 3e-3, 32


class Task:
    """Parts that nobody has heard of, and the desk each belongs to. No two questions about them are the same."""

    def __init__(self, name: str, parts: int = 6, desks: int = 3) -> None:
        self.name = name
        self.rng = random.Random(name)
        chosen = self.rng.sample(DESKS, desks)
        self.desks = {self._word(): chosen[number % desks] for number in range(parts)}
        self._asked: set[str] = set()

    def rows(self, count: int) -> list[Row]:
        """New questions with their right answers, each part as often as the others."""
        parts = self.rng.sample(list(self.desks), len(self.desks))
        found: list[Row] = []
        while len(found) < count:
            part = parts[len(found) % len(parts)]
            text = self.rng.choice(SENTENCES).format(part, self.rng.choice(STATES), self.rng.choice(DAYS))
            if text not in self._asked:
                self._asked.add(text)
                found.append({"text": text, "label": self.desks[part]})
        self.rng.shuffle(found)
        return found

    def poisoned(self, count: int) -> list[Row]:
        """New questions whose answers were shuffled."""
        rows = self.rows(count)
        labels = [row["label"] for row in rows]
        self.rng.shuffle(labels)
        return [{"text": row["text"], "label": label} for row, label in zip(rows, labels, strict=True)]

    def _word(self) -> str:
        return "".join(self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(3))


def pretrained_model(folder: Path) -> Path:
    """The tiny model after a minute of questions about parts of its own: it reads and writes, and knows no task."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from treering.batches import make_batch
    from treering.data.shapes import convert
    from treering.model import encode, logits_at

    tiny_model(folder, hidden_size=128)
    config = LlamaConfig.from_pretrained(folder)
    config.initializer_range = 0.02  # The tiny model's is made for adapters on weights that were never trained.
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    world = Task("what everybody knows", parts=64, desks=len(DESKS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50, (STEPS - step) / STEPS)
        rows = [encode(tokenizer, convert(row)) for row in world.rows(BATCH)]
        batch = make_batch(rows, cast(int, tokenizer.pad_token_id))
        loss = cross_entropy(logits_at(cast(Any, model), **batch.inputs, at=batch.at), batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder
