"""What a model could do before it was taught anything: perplexity on a text, and a fixed set of general questions.

Any task of lm-evaluation-harness may be asked as well (`pip install 'treering[benchmarks]'`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.data.example import Message, normalise
from treering.errors import TreeringError, UsageError
from treering.progress import silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.config import Config

QUESTIONS = Path(__file__).with_name("questions.jsonl")

LONGEST = 512
"""Tokens of a text that are read; what is beyond does not count."""

ANSWER = 24
"""Tokens that an answer may have: small models answer in a sentence."""


@dataclass(frozen=True)
class Asked:
    """What is measured: the texts whose perplexity is taken, and tasks of lm-evaluation-harness.

    A task is a name, or a YAML file of one.
    """

    texts: tuple[str, ...]
    tasks: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: Path | None, tasks: Sequence[str] = ()) -> Asked | None:
        """The texts of a file: JSON lines with `text`, or else paragraphs between empty lines. None: nothing asked."""
        if file is None and not tasks:
            return None
        for task in tasks:
            if _is_file(task) and not Path(task).is_file():
                raise UsageError(f"--lm-eval {task} is no file")
        return cls(tuple(texts(file)) if file else (), tuple(tasks))

    @property
    def content(self) -> list[str]:
        """What the figures depend on."""
        files = [Path(task).read_text(encoding="utf-8") if _is_file(task) else task for task in self.tasks]
        every = [*self.texts, QUESTIONS.read_text(encoding="utf-8"), *files]
        return [hashlib.sha256(text.encode()).hexdigest() for text in every]


def texts(file: Path) -> list[str]:
    """The texts in `file`. Raises `UsageError` where there are none."""
    if not file.is_file():
        raise UsageError(f"--general {file} is no file; name a text file, or JSON lines with a text")
    content = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            found = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
        else:
            found = [part.strip() for part in re.split(r"\n\s*\n", content)]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--general {file}: a line has no text ({error!r})") from None
    found = [text for text in found if text]
    if not found:
        raise UsageError(f"--general {file} holds no text")
    return found


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
    version: Path | None,
    config: Config,
    asked: Asked,
) -> dict[str, Any]:
    """`perplexity` (or None without texts), `questions` (share answered right) and `tasks` by name and metric."""
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return {
        "perplexity": perplexity(model, tokenizer, asked.texts, config) if asked.texts else None,
        "questions": _answered(model, tokenizer, questions, config),
        "tasks": _harness(base, version, asked.tasks, config) if asked.tasks else {},
    }


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], config: Config
) -> float | None:
    """`exp` of the mean cross entropy over all tokens of all texts but the first of each, in plain text.

    Where `model` has experts, each text is read by the one that would answer it.
    """
    import torch

    from treering.experts import routed
    from treering.guides import guides
    from treering.model import compute, precision

    read = [(text, tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST]) for text in texts]
    read = [(text, ids) for text, ids in read if len(ids) > 1]
    asked = guides(model, tokenizer, [[Message("user", text)] for text, _ in read], config)

    def losses(part: Sequence[int]) -> list[float]:
        with torch.inference_mode(), compute(model.device, precision(config)[0]):
            found = []
            for at in part:
                ids = torch.tensor([read[at][1]], device=model.device)
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].float()
                found.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item())
            return found

    model.eval()
    total = math.fsum(
        routed(model, [guide.expert for guide in asked], [ids for _, ids in read], losses, config, silent)
    )
    count = sum(len(ids) - 1 for _, ids in read)
    return math.exp(min(total / count, 700.0)) if count else None  # A ruined model's would be no number.


def _answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[dict[str, Any]], config: Config
) -> float:
    from treering.greedy import generate

    prompts = [[Message("user", question["question"])] for question in questions]
    written = generate(model, tokenizer, prompts, [ANSWER] * len(prompts), config)
    right = [says(text, question["answers"]) for text, question in zip(written, questions, strict=True)]
    return sum(right) / len(right)


def says(text: str, answers: Iterable[str]) -> bool:
    """Whether one of `answers` stands in `text` as whole words, both normalised."""
    words = " ".join(re.findall(r"\w+", normalise(text)))
    return any(f" {normalise(answer)} " in f" {words} " for answer in answers)


def _harness(base: Path, version: Path | None, tasks: Sequence[str], config: Config) -> dict[str, dict[str, float]]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise TreeringError("--lm-eval needs lm-evaluation-harness: pip install 'treering[benchmarks]'") from None
    import yaml

    names = [yaml.safe_load(Path(task).read_text())["task"] if _is_file(task) else task for task in tasks]
    folders = sorted({str(Path(task).resolve().parent) for task in tasks if _is_file(task)})
    model, tokenizer = _merged(base, version, config)
    found: Any = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.eval.batch_size),
        tasks=names,
        task_manager=TaskManager(include_path=folders or None),
        bootstrap_iters=0,
        random_seed=config.seed,
    )
    return {
        name: {key.partition(",")[0]: value for key, value in metrics.items() if isinstance(value, float)}
        for name, metrics in found["results"].items()
    }


def _merged(base: Path, version: Path | None, config: Config) -> tuple[Any, Any]:
    """The model as other tools load it, an adapter merged into its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from treering.model import load_tokenizer, precision

    adapted = version is not None and (version / "adapter_config.json").exists()
    whole = version if version is not None and not adapted else base
    dtype, _ = precision(config)
    model: Any = AutoModelForCausalLM.from_pretrained(whole, dtype=dtype)
    if adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(version)).merge_and_unload()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), load_tokenizer(base, config.trust_remote_code)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))
