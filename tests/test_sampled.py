"""Drawn texts: each by its own seed, whatever is drawn beside it, and by the model's probabilities."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import StopAt
from treering import attention
from treering.config import Config
from treering.errors import UpdateInterruptedError
from treering.model import load_base
from treering.sampled import draw, probabilities
from treering.tree import Tree

BEGINNING = [3, 1, 4, 1, 5]
SEEDS = [f"seed {number}" for number in range(6)]


@pytest.fixture(scope="module", params=[attention.NAME, "eager"])
def model(request: pytest.FixtureRequest, model_folder: Path) -> Any:
    found: Any = load_base(model_folder, Config(bf16=False))
    found.set_attn_implementation(request.param)
    return found.eval()


def drawn(
    model: Any, seeds: list[str], *, end: int = -1, limit: int = 8, temperature: float = 0.5, top_p: float = 1.0
) -> list[list[int] | None]:
    tree = Tree(model, Config(bf16=False), 0)
    return draw(tree, BEGINNING, seeds, end, limit, temperature, top_p)


def ends(model: Any) -> int:
    """A token that some texts come to, and others do not."""
    first = Counter(written[0] for seed in SEEDS if (written := _any(model, seed)))
    return first.most_common(1)[0][0]


def _any(model: Any, seed: str) -> list[int]:
    """What is written after that seed where no end mark comes."""
    tree = Tree(model, Config(bf16=False), 0)
    seen: list[int] = []
    go_on = tree.go_on

    def noted(asked: Any) -> Any:
        ways = list(asked)
        seen.extend(ways[0][1][0])
        return go_on(ways)

    tree.go_on = noted  # type: ignore[method-assign]
    draw(tree, BEGINNING, [seed], -1, 8, 0.5, 1.0)
    return seen


def test_a_text_is_the_same_alone_and_beside_others(model: Any) -> None:
    end = ends(model)
    together = drawn(model, SEEDS, end=end)
    assert together == [drawn(model, [seed], end=end)[0] for seed in SEEDS]
    assert together == drawn(model, SEEDS[::-1], end=end)[::-1]
    assert [] in together  # Its first token was the end.
    assert len({tuple(_any(model, seed)) for seed in SEEDS}) == len(SEEDS)


def test_what_does_not_end_in_time_is_none(model: Any) -> None:
    assert drawn(model, SEEDS[:2]) == [None, None]
    written = _any(model, SEEDS[0])
    at = next(place for place in range(1, 8) if written[place] not in written[:place])
    assert drawn(model, SEEDS[:1], end=written[at], limit=at) == [written[:at]]
    assert drawn(model, SEEDS[:1], end=written[at], limit=at - 1) == [None]


def test_without_heat_it_is_greedy(model: Any) -> None:
    ids = list(BEGINNING)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    new = ids[len(BEGINNING) :]
    end = new.pop()
    if end not in new:
        assert drawn(model, ["x", "y"], end=end, temperature=0.0) == [new, new]
    assert drawn(model, ["x"], end=new[0], temperature=0.0) == [[]]


def test_the_first_token_comes_as_often_as_is_likely(model: Any) -> None:
    with torch.no_grad():
        scores = model(torch.tensor([BEGINNING])).logits[0, -1]
    wanted = (scores / 0.8).softmax(-1)
    likeliest = int(wanted.argmax())
    found = drawn(model, [str(n) for n in range(300)], end=likeliest, limit=0, temperature=0.8)
    share = float(wanted[likeliest])
    assert sum(text == [] for text in found) / 300 == pytest.approx(share, abs=4 * (share * (1 - share) / 300) ** 0.5)


def test_the_smallest_set_that_holds_enough() -> None:
    scores = torch.tensor([0.5, 0.2, 0.3]).log()
    assert probabilities(scores, 1.0, 1.0).tolist() == pytest.approx([0.5, 0.2, 0.3])
    assert probabilities(scores, 1.0, 0.6).tolist() == pytest.approx([0.5, 0.0, 0.3])
    assert probabilities(scores, 1.0, 0.1).tolist() == pytest.approx([0.5, 0.0, 0.0])
    squared = [0.25 / 0.38, 0.04 / 0.38, 0.09 / 0.38]
    assert probabilities(scores, 0.5, 1.0).tolist() == pytest.approx(squared)


def test_it_ends_when_asked(model_folder: Path) -> None:
    tree = Tree(load_base(model_folder, Config(bf16=False)), Config(bf16=False), 0)
    with pytest.raises(UpdateInterruptedError):
        draw(tree, BEGINNING, SEEDS, -1, 8, 1.0, 1.0, StopAt(3))
