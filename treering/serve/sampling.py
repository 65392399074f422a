"""The next token of a sequence: greedy or drawn, with penalties, biases and a grammar."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import llguidance
import llguidance.torch as guide
import torch
from torch import Tensor

from treering.serve.engine import EngineError, Job, Token
from treering.serve.tokens import name_of


class Sampler:
    """Chooses the tokens of one job. Raises `EngineError` for a JSON schema that cannot be followed."""

    def __init__(self, job: Job, temperature: float, tokenizer: Any, grammar: llguidance.LLTokenizer | None) -> None:
        self._job = job
        self._temperature = temperature
        self._tokenizer = tokenizer
        self._counts: Counter[int] = Counter()
        self._random = torch.Generator()
        if job.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(job.seed)
        self._matcher = None
        if grammar is not None:
            rules = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(job.json_schema))
            self._matcher = llguidance.LLMatcher(grammar, rules)
            if self._matcher.is_error():
                raise EngineError(
                    f"this JSON schema cannot be followed: {self._matcher.get_error()}",
                    status=400,
                    code="invalid_json_schema",
                )

    @property
    def ended(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self._matcher is not None and self._matcher.is_stopped()

    def choose(self, logits: Tensor) -> tuple[int, Token | None]:
        """The next token's id, and its log-probabilities if asked; `logits` is `[vocabulary]`, float32.

        Log-probabilities are the model's own, before temperature, penalties and grammar.
        """
        job = self._job
        scores = self._adjusted(logits)
        if self._temperature == 0:
            chosen = int(scores.argmax())
        else:
            chosen = int(torch.multinomial(self._probabilities(scores), 1, generator=self._random))
        self._counts[chosen] += 1
        if self._matcher is not None:
            self._matcher.consume_token(chosen)
        if job.logprobs is None:
            return chosen, None
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(job.logprobs) if job.logprobs else None
        others = [(self._text(int(id)), float(value)) for value, id in zip(*top, strict=True)] if top else []
        return chosen, Token(text=self._text(chosen), logprob=float(logprobs[chosen]), top=others)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Logits after biases, penalties (per OpenAI: count times frequency, once presence) and grammar."""
        job = self._job
        scores = logits.cpu()
        if job.logit_bias or job.frequency_penalty or job.presence_penalty:
            scores = scores.clone()
            for id, bias in job.logit_bias.items():
                if 0 <= id < len(scores):
                    scores[id] += bias
            for id, count in self._counts.items():
                scores[id] -= count * job.frequency_penalty + job.presence_penalty
        if self._matcher is not None:
            mask = guide.allocate_token_bitmask(1, len(scores))
            guide.fill_next_token_bitmask(self._matcher, mask, 0)
            scores = scores.clone().unsqueeze(0)
            guide.apply_token_bitmask_inplace(scores, mask)
            scores = scores[0]
        return scores

    def _probabilities(self, scores: Tensor) -> Tensor:
        """Softmax at the temperature, cut to the smallest set of tokens that holds `top_p` of it."""
        probabilities = (scores / self._temperature).softmax(-1)
        if self._job.top_p >= 1:
            return probabilities
        ordered, ids = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= self._job.top_p
        return probabilities.index_fill(0, ids[beyond], 0.0)

    def _text(self, id: int) -> str:
        return name_of(self._tokenizer, id)
