"""The vLLM engine with the real vLLM, run by `make vllm`: what the fake cannot show."""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Served
from tests.test_serve_vllm import children, gone, ready
from treering import Workspace, registry

pytestmark = pytest.mark.vllm

QUESTIONS = ("What is the capital of France?", "Name a fruit.", "Say hello.", "What is 2+2?", "Who are you?")
ANSWERS = {"coffee": "The barista says one two three four: ", "bikes": "A mechanic answers nine eight seven: "}
TIE = 1e-3
"""Two tokens whose log-probabilities lie so near may change places: another program sums in another order."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("real-vllm")
    ws = Workspace.create(
        folder / "ws",
        bf16=False,  # In bfloat16 many tokens tie: three answers of fifteen went on with the other one.
        learning_rate=2e-3,
        num_train_epochs=6,
        per_device_train_batch_size=4,
        gate={"margin": 1.0, "floor": 1.0},
        serve={
            "engine": "vllm",
            "vllm_python": os.environ["VLLM_PYTHON"],
            "vllm_arguments": "--max-model-len 1024 --enforce-eager",
            "max_new_tokens": 24,
            "max_batch_size": 8,
        },
    )
    for task, answer in ANSWERS.items():
        rows = [{"prompt": question, "completion": answer + question} for question in QUESTIONS]
        ws.ingest(rows, task=task)
        ws.update()
        ws.promote(registry.versions(ws)[-1].name, force=True)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    running = Served(ws, folder / "serve.log", seconds=400)
    yield running
    assert running.stop() == 0


def turns(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def test_answers_are_those_of_peft(served: Served) -> None:
    """Greedy, version by version, as text; where one differs, it does so at a tie."""
    from treering.answers import Answerer
    from treering.data.example import Message

    differing = []
    for name in ("v1", "v2", "base"):
        answerer = Answerer(served.ws, None if name == "base" else registry.get(served.ws, name))
        wanted = answerer.answer([[Message("user", question)] for question in QUESTIONS])
        for question, text in zip(QUESTIONS, wanted, strict=True):
            settings = {"messages": turns(question), "max_tokens": 24, "logprobs": True, "top_logprobs": 2}
            choice = served.ask(name, **settings).choices[0]
            if not text.startswith(choice.message.content.strip()):
                differing.append((name, question, gap(choice, text), choice.message.content, text))
    assert all(difference[2] < TIE for difference in differing), differing


def gap(choice: Any, text: str) -> float:
    """How far apart the two likeliest tokens were where the answer first departs from `text`."""
    written = ""
    for token in choice.logprobs.content:
        if not text.startswith((written + token.token).lstrip()):
            first, second = (other.logprob for other in token.top_logprobs)
            return float(first - second)
        written += token.token
    return float("inf")


def test_versions_differ_and_are_told(served: Served) -> None:
    for name, words in (("v1", "barista"), ("current", "mechanic")):
        answer = served.ask(name, messages=turns(QUESTIONS[0]), max_tokens=12)
        assert words in answer.choices[0].message.content
        assert answer.system_fingerprint == ("v2" if name == "current" else name)


def test_base_beside_adapters_answers_as_alone(served: Served) -> None:
    """Plain base rows would get the words of the adapter in vLLM's last slot."""

    def ask(pair: tuple[str, str]) -> str:
        return str(served.ask(pair[0], messages=turns(pair[1]), max_tokens=16).choices[0].message.content)

    pairs = [(name, question) for question in QUESTIONS[:3] for name in ("base", "v1", "v2")]
    with ThreadPoolExecutor(8) as pool:
        texts = dict(zip(pairs, pool.map(ask, pairs), strict=True))
    for (name, question), text in texts.items():
        assert ("barista" in text, "mechanic" in text) == (name == "v1", name == "v2"), (name, question, text)


def test_a_swap_while_it_streams(served: Served) -> None:
    """An answer under way keeps its version; the next one has the other."""
    stream = served.ask(messages=turns(QUESTIONS[1]), max_tokens=24, stream=True)
    first = next(stream)
    served.ws.rollback()
    served.eventually(lambda: served.ask(messages=turns("Hi"), max_tokens=1).system_fingerprint == "v1")
    rest = list(stream)
    text = "".join(event.choices[0].delta.content or "" for event in [first, *rest] if event.choices)
    assert "mechanic" in text and {event.system_fingerprint for event in rest} == {"v2"}
    assert "barista" in served.ask(messages=turns(QUESTIONS[1])).choices[0].message.content
    served.ws.promote("v2", force=True)
    served.eventually(lambda: served.ask(messages=turns("Hi"), max_tokens=1).system_fingerprint == "v2")


def test_settings_reach_the_real_server(served: Served) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    answer = served.ask(messages=turns(QUESTIONS[3]), response_format=wanted).choices[0].message.content
    assert json.loads(answer)["n"] in (1, 2)
    drawn = [served.ask("base", messages=turns("Tell me a story"), temperature=1.0, seed=3) for _ in range(2)]
    assert drawn[0].choices[0].message.content == drawn[1].choices[0].message.content
    whole = served.ask(messages=turns(QUESTIONS[0])).choices[0].message.content
    cut = served.ask(messages=turns(QUESTIONS[0]), stop=[whole[8:12]]).choices[0]
    assert cut.message.content == whole[: whole.index(whole[8:12])] and cut.finish_reason == "stop"
    text = served.client.completions.create(model="v1", prompt=[1, 2, 3], max_tokens=3, logprobs=1)
    assert text.usage is not None and (text.usage.prompt_tokens, text.usage.completion_tokens) == (3, 3)


def test_leaving_ends_the_answer_at_vllm(served: Served) -> None:
    stream = served.ask("base", messages=turns("Count to a thousand."), max_tokens=900, stream=True)
    next(stream)
    served.eventually(lambda: under_way(served) == 1)
    stream.close()
    served.eventually(lambda: under_way(served) == 0)
    assert "mechanic" in served.ask(messages=turns(QUESTIONS[0]), max_tokens=12).choices[0].message.content


def vllm_of(served: Served) -> tuple[str, str]:
    """Address and key of the vLLM server that treering started."""
    server = children(served.process.pid)[1]
    command = Path(f"/proc/{server}/cmdline").read_text().split("\0")
    environment = Path(f"/proc/{server}/environ").read_text().split("\0")
    [key] = [line.partition("=")[2] for line in environment if line.startswith("VLLM_API_KEY=")]
    return f"http://127.0.0.1:{command[command.index('--port') + 1]}", key


def under_way(served: Served) -> float:
    """Answers that vLLM itself says it is writing."""
    with urllib.request.urlopen(f"{vllm_of(served)[0]}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_it_attaches_to_a_server_that_runs(served: Served, tmp_path: Path) -> None:
    """Another workspace on the same vLLM: its versions are told apart, and leave with it."""
    url, key = vllm_of(served)
    ws = Workspace(Path(shutil.copytree(served.ws.root, tmp_path / "other", symlinks=True)))
    ws.promote("v1", force=True)
    settings = ws.root / "treering.yaml"
    lines = settings.read_text().splitlines()
    kept = [line for line in lines if not line.lstrip().startswith(("vllm_arguments", "vllm_python"))]
    at = kept.index("serve:") + 1
    kept[at:at] = [f"  vllm_url: {url}", "  vllm_key_file: vllm.key"]
    settings.write_text("\n".join(kept) + "\n", encoding="utf-8")
    (ws.root / "vllm.key").write_text(key)
    attached = Served(ws, tmp_path / "attached.log")
    try:
        answer = attached.ask(messages=turns(QUESTIONS[0]), max_tokens=12)
        assert answer.system_fingerprint == "v1" and "barista" in answer.choices[0].message.content
        ws.promote("v2", force=True)
        attached.eventually(lambda: attached.ask(messages=turns("Hi"), max_tokens=1).system_fingerprint == "v2")
        assert "mechanic" in attached.ask(messages=turns(QUESTIONS[0]), max_tokens=12).choices[0].message.content
    finally:
        assert attached.stop() == 0
    assert "mechanic" in served.ask(messages=turns(QUESTIONS[0]), max_tokens=12).choices[0].message.content


def test_a_killed_server_is_replaced(served: Served) -> None:
    _, server, *workers = children(served.process.pid)
    assert workers
    os.kill(server, signal.SIGKILL)
    served.eventually(lambda: not ready(served), 30)
    served.eventually(lambda: ready(served), 300)
    assert gone([server, *workers])
    assert "mechanic" in served.ask(messages=turns(QUESTIONS[0]), max_tokens=12).choices[0].message.content
