"""One scorer of `treering bench speed`: the same held-out rows, scored once a line on standard input.

All work with the adapter that treering has just trained, all write greedily, and no label needs more tokens than any of
them may write. The peers have it merged into bfloat16 weights, which is their fastest way; treering scores it as it is,
and tells the held-out loss besides.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from treering.bench.contestant import used_mb
from treering.config import Config
from treering.data.example import Example
from treering.model import encode, load_base, load_tokenizer
from treering.pipes import own_output
from treering.scoring import exact_match

SPARE_TOKENS = 2
"""Tokens that may be written beyond the longest label, as in treering's own scoring."""

Score = Callable[[], list[str]]
"""Answers all rows, in their order."""


def ours(base: Path, adapter: Path, config: Config, rows: Sequence[Example]) -> Score:
    """As updates are judged."""
    from peft import PeftModel

    from treering.evaluate import evaluate
    from treering.lora_product import join

    tokenizer = load_tokenizer(base)
    model: Any = PeftModel.from_pretrained(load_base(base, config), str(adapter))
    join(model)
    pairs = [(row, "held out") for row in rows]

    def score() -> list[str]:
        found = evaluate(model, tokenizer, pairs, {"held out": "exact_match"}, config, quiet=True)
        return [result.prediction for result in found]

    return score


def generate(base: Path, adapter: Path, config: Config, rows: Sequence[Example]) -> Score:
    """Transformers' `generate`, prompts of like length together."""
    tokenizer, model, limit = _merged(base, adapter, rows)
    tokenizer.padding_side = "left"
    prompts = _prompts(tokenizer, rows)
    order = sorted(range(len(rows)), key=lambda at: len(prompts[at]))
    size = config.eval.batch_size

    @torch.inference_mode()
    def score() -> list[str]:
        answers: dict[int, str] = {}
        for start in range(0, len(order), size):
            part = order[start : start + size]
            inputs = tokenizer(
                [prompts[at] for at in part], return_tensors="pt", padding=True, add_special_tokens=False
            ).to(model.device)
            written = model.generate(
                **inputs, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers.update(zip(part, texts, strict=True))
        return [answers[at] for at in range(len(rows))]

    return score


def lm_eval(base: Path, adapter: Path, config: Config, rows: Sequence[Example]) -> Score:
    """lm-evaluation-harness, by its Python interface: `generate_until` of its model class for transformers."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer, model, limit = _merged(base, adapter, rows)
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.eval.batch_size)
    settings = {"until": [tokenizer.eos_token], "max_gen_toks": limit, "do_sample": False}
    asked = [
        Instance("generate_until", {}, (prompt, settings), at) for at, prompt in enumerate(_prompts(tokenizer, rows))
    ]

    def score() -> list[str]:
        found: list[str] = judge.generate_until(asked, disable_tqdm=True)
        return found

    return score


def _merged(base: Path, adapter: Path, rows: Sequence[Example]) -> tuple[Any, Any, int]:
    """Tokenizer, model with the adapter in its weights, and how many tokens an answer may have."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model: Any = PeftModel.from_pretrained(plain, str(adapter))
    limit = max(len(encode(tokenizer, row, last_only=True).answers) for row in rows) + SPARE_TOKENS
    return tokenizer, model.merge_and_unload().eval().to("cuda" if torch.cuda.is_available() else "cpu"), limit


def _prompts(tokenizer: Any, rows: Sequence[Example]) -> list[str]:
    asked = [row.as_dicts()[:-1] for row in rows]
    return [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in asked]


SCORERS = {"treering": ours, "generate": generate, "lm-eval": lm_eval}


def main(name: str, work: Path) -> None:
    """Run the scorer `name`, until standard input ends."""
    out = own_output()
    given = json.loads(work.read_text(encoding="utf-8"))
    rows = [Example.of(messages) for messages in given["held_out"]]
    score = SCORERS[name](Path(given["base"]), work.parent / "adapter", Config.build(given["config"]), rows)
    for _ in sys.stdin:
        started = time.perf_counter()
        answers = score()
        seconds = time.perf_counter() - started
        right = statistics.fmean(exact_match(answer, row.answer) for answer, row in zip(answers, rows, strict=True))
        out.write(json.dumps({"seconds": seconds, "right": right, "peak_memory_mb": used_mb()}) + "\n")
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
