"""How many threads a forward pass takes on a processor."""

from __future__ import annotations

import torch

MOST = max(1, torch.get_num_threads() - 1)
"""One core is left to the server. Taken at the start: torch tells a new thread what was set last."""

PARAMETERS = 300_000_000
"""So many are worth a thread, for they have to be read from memory."""

PRODUCTS = 1_200_000_000
"""So many multiplications are worth another."""


def worth(parameters: int, tokens: int, most: int = MOST) -> int:
    """Threads for a pass of `tokens` through a model of so many `parameters`, `most` at most.

    More would wait for each other at every product.
    """
    return min(most, max(1, parameters // PARAMETERS, parameters * tokens // PRODUCTS))
