"""The next token of a sequence: greedy or drawn, with what its prompt recalls, penalties, biases and a grammar."""

from __future__ import annotations

import math
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from treering.methods.recall import Recalled
from treering.sampled import COLDEST, probabilities
from treering.serve.engine import EngineError, Job, Token
from treering.serve.grammars import refused
from treering.serve.tokens import name_of

MOST_BIASES = 300
"""As OpenAI has it."""


class Sampler:
    """Chooses the tokens of one job, those that `matcher` allows if there is one.

    Raises `EngineError` for a job whose settings cannot be followed.
    """

    def __init__(self, job: Job, temperature: float, tokenizer: Any, matcher: llguidance.LLMatcher | None) -> None:
        if len(job.logit_bias) > MOST_BIASES:
            raise EngineError(
                f"logit_bias names {len(job.logit_bias)} tokens; name {MOST_BIASES} at most",
                status=400,
                code="too_many_biases",
            )
        unknown = [id for id in job.logit_bias if not 0 <= id < len(tokenizer)]
        if unknown:
            raise EngineError(
                f"logit_bias names the token {unknown[0]}; this model has those from 0 to {len(tokenizer) - 1}",
                status=400,
                code="unknown_token",
            )
        self._job = job
        self._temperature = temperature
        self._tokenizer = tokenizer
        self._shift: Tensor | None = None  # What biases and penalties add to the score of each token.
        self._chosen: set[int] = set()
        self._random = torch.Generator()
        if job.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(job.seed)
        self._matcher = matcher
        self._recalled: Recalled | None = None

    def recall(self, recalled: Recalled | None) -> None:
        """Have labels that the prompt recalls a part in what is chosen; not where a grammar says what may come."""
        self._recalled = recalled if self._matcher is None else None

    @property
    def ended(self) -> bool:
        """Whether the grammar allows nothing more. Raises `EngineError` where it is too much to follow."""
        if self._matcher is None or not self._matcher.is_stopped():
            return False
        self._check()
        return True

    def choose(self, logits: Tensor) -> tuple[int, Token | None]:
        """The next token's id, and its log-probabilities if asked; `logits` is `[vocabulary]`, float32.

        Log-probabilities are the model's own, before recall, temperature, penalties and grammar. Raises `EngineError`
        if there is nothing to choose from.
        """
        job = self._job
        scores = self._adjusted(logits.cpu())
        best = float(scores.max())
        if not math.isfinite(best):
            raise EngineError(
                f"{job.version} gives no token a score to choose it by (the best is {best}): its weights may be "
                "damaged, or too large for float16 (fp16: false does without it); ask another version",
                code="no_scores",
            )
        if self._temperature < COLDEST:
            chosen = int(scores.argmax())
        else:
            found = probabilities(scores, self._temperature, job.top_p)
            chosen = int(torch.multinomial(found, 1, generator=self._random))
        self._note(chosen)
        if job.logprobs is None:
            return chosen, None
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(job.logprobs) if job.logprobs else None
        others = [(self._text(int(id)), float(value)) for value, id in zip(*top, strict=True)] if top else []
        return chosen, Token(text=self._text(chosen), logprob=float(logprobs[chosen]), top=others)

    def _adjusted(self, scores: Tensor) -> Tensor:
        """Logits after recall, biases, penalties and grammar."""
        if self._recalled is not None:
            scores = self._recalled.blended(scores)
        if self._job.logit_bias or self._penalised:
            if self._shift is None:
                self._shift = torch.zeros_like(scores)
                for id, bias in self._job.logit_bias.items():
                    self._shift[id] = bias
            scores = scores + self._shift
        if self._matcher is not None:
            mask = self._matcher.compute_bitmask()
            self._check()
            allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
            allowed.resize(len(scores))  # The mask ends with a whole byte, the vocabulary where it likes.
            scores = scores.masked_fill(torch.from_numpy(allowed) == 0, -math.inf)
        return scores

    @property
    def _penalised(self) -> bool:
        return bool(self._job.frequency_penalty or self._job.presence_penalty)

    def _note(self, chosen: int) -> None:
        """Penalties are OpenAI's: one each time, one once."""
        self._recalled = self._recalled and self._recalled.after(chosen)
        if self._penalised and self._shift is not None:
            once = 0.0 if chosen in self._chosen else self._job.presence_penalty
            self._shift[chosen] -= self._job.frequency_penalty + once
            self._chosen.add(chosen)
        if self._matcher is not None:
            self._matcher.consume_token(chosen)
            self._check()

    def _check(self) -> None:
        """Raise `EngineError` where the grammar has failed: limits of its own are met only as it goes on."""
        if self._matcher is not None and self._matcher.is_error():
            raise refused(self._matcher.get_error())

    def _text(self, id: int) -> str:
        return name_of(self._tokenizer, id)
