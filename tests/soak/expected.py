"""What each version answers to each question, by transformers and peft alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from treering import Workspace

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@dataclass(frozen=True)
class Question:
    """A request's body but for `model` and `stream`."""

    name: str
    path: str
    body: dict[str, Any] = field(hash=False)


class Answer(NamedTuple):
    """A greedy answer and its number of tokens."""

    text: str
    finish: str
    tokens: int


class Expected:
    """The answers of the versions of `ws` that are named."""

    def __init__(self, ws: Workspace, versions: list[str], questions: list[Question]) -> None:
        self.answers: dict[tuple[str, str], Answer] = {}
        self.vectors: dict[tuple[str, str], list[float]] = {}
        for version in versions:
            reader = _Reader(ws, version)
            for question in questions:
                at = version, question.name
                if question.path == VECTORS:
                    self.vectors[at] = reader.vector(question.body["input"])
                else:
                    self.answers[at] = reader.answer(question)

    def tells_apart(self, question: Question, versions: list[str]) -> bool:
        """Whether no two of the versions answer alike."""
        if question.path == VECTORS:
            return len({tuple(round(x, 2) for x in self.vectors[v, question.name]) for v in versions}) == len(versions)
        return len({self.answers[version, question.name].text for version in versions}) == len(versions)


class _Reader:
    def __init__(self, ws: Workspace, version: str) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = ws.config().model_name_or_path
        assert base is not None
        self._tokenizer: Any = AutoTokenizer.from_pretrained(base)
        model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        if version != "base":
            model = PeftModel.from_pretrained(model, str(ws.versions / version))
        self._model = model.eval()

    def answer(self, question: Question) -> Answer:
        import torch

        if question.path == CHAT:
            asked = self._tokenizer.apply_chat_template(
                question.body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            asked = self._tokenizer(question.body["prompt"], return_tensors="pt")
        end = self._tokenizer.eos_token_id
        with torch.inference_mode():
            tokens = self._model.generate(
                **asked,
                do_sample=False,
                max_new_tokens=question.body["max_tokens"],
                eos_token_id=end,
                pad_token_id=end,
            )[0, asked["input_ids"].shape[1] :]
        finish = "stop" if tokens[-1] == end else "length"
        return Answer(self._tokenizer.decode(tokens, skip_special_tokens=True), finish, len(tokens))

    def vector(self, text: str) -> list[float]:
        import torch

        with torch.inference_mode():
            asked = self._tokenizer(text, return_tensors="pt")
            states = self._model(**asked, output_hidden_states=True).hidden_states[-1][0]
            found: list[float] = torch.nn.functional.normalize(states.mean(0), dim=0).tolist()
        return found
