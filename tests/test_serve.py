"""The server as its users meet it: `treering serve` in a process of its own, driven by the official client."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.drawn import met
from tests.serving import ASK, LONG, Served, greedy
from treering import Workspace, feedback, registry, remarks
from treering.serve import keys
from treering.testing import CHAT_TEMPLATE, tiny_model, toy_rows


@pytest.fixture(scope="module")
def served(trained: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(trained, tmp_path_factory.mktemp("log") / "serve.log")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="module")
def texts(trained: Workspace) -> dict[str, str]:
    """What each version answers to `ASK` with 12 tokens at most, by transformers and peft alone."""
    found = {name: greedy(trained, name, ASK, 12) for name in ("base", "v1", "v2")}
    assert len(set(found.values())) == 3
    return found


@pytest.fixture(autouse=True)
def v2_is_current(trained: Workspace) -> None:
    here = registry.current(trained)
    if here is None or here.name != "v2":
        trained.promote("v2", force=True)


def test_models_are_listed(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["current", "base", "v1", "v2"]
    assert served.client.models.retrieve("v1").id == "v1"


def test_an_alias_names_a_version(served: Served, trained: Workspace, texts: dict[str, str]) -> None:
    remarks.set_alias(trained.root, "champion", "v1")
    remarks.set_alias(trained.root, "gone", "v9")
    try:
        assert [model.id for model in served.client.models.list()] == ["current", "base", "v1", "v2", "champion"]
        answer = served.client.chat.completions.create(model="champion", messages=ASK, max_tokens=12)
        assert (answer.system_fingerprint, answer.model) == ("v1", "champion")
        assert answer.choices[0].message.content == texts["v1"]
    finally:
        (trained.root / remarks.FILE).unlink()


def test_every_answer_says_which_version_made_it(served: Served, texts: dict[str, str]) -> None:
    for name, version in (("current", "v2"), ("v1", "v1"), ("base", "base")):
        raw = served.client.chat.completions.with_raw_response.create(model=name, messages=ASK, max_tokens=12)
        assert raw.headers["x-treering-version"] == version
        answer = raw.parse()
        assert (answer.system_fingerprint, answer.model) == (version, name)
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 12 and answer.usage.prompt_tokens > len(ASK[0]["content"])
        assert answer.choices[0].message.content == texts[version]


def test_it_answers_as_predict_does(served: Served, trained: Workspace) -> None:
    from treering.answers import Answerer
    from treering.data.example import Message

    asked = [f"{task} item {number}: sort {label}" for task in "ab" for number, label in enumerate("abcd")]
    for name in ("v1", "v2", "base"):
        version = None if name == "base" else registry.get(trained, name)
        wanted = Answerer(trained, version).answer([[Message("user", text)] for text in asked])
        given = [
            served.ask(name, messages=[{"role": "user", "content": text}], max_tokens=128).choices[0].message.content
            for text in asked
        ]
        assert [text.strip() for text in given] == wanted


def test_a_stream_is_the_answer_in_pieces(served: Served) -> None:
    whole = served.ask("base", max_tokens=20)
    events = list(served.ask("base", max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert events[-1].usage == whole.usage
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == whole.choices[0].finish_reason
    assert {event.system_fingerprint for event in events} == {"base"}


def test_text_completions(served: Served) -> None:
    answer = served.client.completions.create(model="base", prompt=["ab", "cd"], max_tokens=4, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    # Greedy: what was chosen is what was likeliest.
    assert logprobs.token_logprobs == [next(iter(top.values())) for top in logprobs.top_logprobs]
    again = served.client.completions.create(model="base", prompt=list(b"ab"), max_tokens=4)
    assert again.usage is not None and again.usage.prompt_tokens == 2
    streamed = served.client.completions.create(model="base", prompt="ab", max_tokens=4, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == answer.choices[0].text


def test_logprobs_of_a_chat(served: Served) -> None:
    answer = served.ask("base", logprobs=True, top_logprobs=3, max_tokens=5)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5 and all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in content)


def test_a_seed_repeats_and_choices_differ(served: Served) -> None:
    def drawn(seed: int) -> list[str]:
        answer = served.ask("base", seed=seed, temperature=1.5, n=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = drawn(1)
    assert first == drawn(1) and len(set(first)) == 3 and first != drawn(2)


def test_stop_strings_end_the_answer(served: Served) -> None:
    text = served.ask("base", max_tokens=20).choices[0].message.content
    stop = text[6:8]
    answer = served.ask("base", max_tokens=20, stop=[stop]).choices[0]
    assert answer.message.content == text[: text.index(stop)] and answer.finish_reason == "stop"


def test_an_answer_follows_a_schema(served: Served) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    answer = served.ask("base", response_format=wanted, max_tokens=200, temperature=1.5, seed=1).choices[0]
    if answer.finish_reason == "stop":
        assert json.loads(answer.message.content)["n"] in (1, 2)
    else:  # White space without end is valid JSON too, and random weights like it.
        assert re.fullmatch(r'\s*\{?\s*("n"?)?\s*:?\s*', answer.message.content)
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        served.ask(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}})


def test_what_clients_send_by_habit_is_taken(served: Served) -> None:
    habits = {"echo": False, "best_of": 1, "suffix": None}
    made = served.client.completions.create(model="base", prompt="some", max_tokens=2, extra_body=habits)
    assert made.system_fingerprint == "base"
    with pytest.raises(openai.BadRequestError, match="echo"):
        served.client.completions.create(model="base", prompt="some", echo=True)


def test_embeddings(served: Served) -> None:
    made = served.client.embeddings.create(model="current", input=["some text", "other", "some text"])
    first, other, again = (item.embedding for item in made.data)
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-4)
    assert first == pytest.approx(again, abs=1e-6) and first != pytest.approx(other, abs=1e-2)
    plain = served.client.embeddings.create(model="current", input="some text", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(first, abs=1e-6)
    assert served.client.embeddings.create(model="base", input="some text").data[0].embedding != first


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        ({"model": "gpt-4"}, 404, "there are: current, base, v1, v2"),
        ({"temperature": 9}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, 400, "this model reads 2048"),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, 413, "larger than 20000 bytes"),
        ({"extra_body": {"best_of": 3}}, 400, "best_of"),
        ({"top_logprobs": 2}, 400, "needs logprobs"),
        ({"n": 9}, 400, "more than the 8 that there is room for"),
    ],
)
def test_a_wrong_request_is_told_so(served: Served, settings: dict[str, Any], status: int, words: str) -> None:
    with pytest.raises(openai.APIStatusError) as found:
        served.ask(**settings)
    assert found.value.status_code == status
    assert isinstance(found.value.body, dict) and words in found.value.body["message"]
    assert served.ask().system_fingerprint == "v2"


def test_no_text_speaks_for_somebody_else(served: Served) -> None:
    """A mark of the chat format in a client's text is read as the letters it is made of."""

    def read(text: str) -> int:
        return int(served.ask(messages=[{"role": "user", "content": text}], max_tokens=1).usage.prompt_tokens)

    assert read("a<|im_end|>b") == read("a< |im_end|>b") > read("ab") + 5


def test_tools_are_said_as_text_where_the_template_has_no_place_for_them(served: Served) -> None:
    tools = [{"type": "function", "function": {"name": "weather_of_the_town"}}]
    assert served.ask(tools=tools, max_tokens=1).usage.prompt_tokens > served.ask(max_tokens=1).usage.prompt_tokens + 50


def test_a_full_queue_says_when_to_come_back(served: Served) -> None:
    stream = served.ask("base", messages=LONG, n=8, max_tokens=1500, stream=True, logit_bias={257: -100})
    next(stream)
    with pytest.raises(openai.RateLimitError, match="8 answers are under way or wait, and 8 is the most") as found:
        served.ask()
    assert found.value.response.headers["retry-after"] == "1"
    stream.close()
    served.eventually(lambda: "treering_answers_under_way 0.0" in served.get("/metrics"))


def test_a_promotion_is_followed_while_answers_run(served: Served) -> None:
    """Answers under way keep their version, none fails, and the promoted one answers without a restart."""
    stream = served.ask(messages=LONG, max_tokens=1500, stream=True)
    first = next(stream)
    served.ws.rollback()
    served.eventually(lambda: served.ask(max_tokens=1).system_fingerprint == "v1")
    assert {first.system_fingerprint} | {event.system_fingerprint for event in stream} == {"v2"}
    assert json.loads(served.get("/readyz"))["serving"] == "v1"


def test_nothing_fails_while_versions_change(served: Served, texts: dict[str, str]) -> None:
    """Every answer is what its version writes alone, whatever others run beside it."""
    ended, failures, seen = threading.Event(), [], set()

    def load() -> None:
        while not ended.is_set():
            try:
                answer = served.ask()
                seen.add((answer.system_fingerprint, answer.choices[0].message.content))
            except openai.APIError as error:
                failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for name in ("v1", "v2", "v1", None):
        served.ws.rollback() if name is None else served.ws.promote(name, force=True)
        wanted = registry.current(served.ws)
        assert wanted is not None
        served.eventually(lambda wanted=wanted: served.ask(max_tokens=1).system_fingerprint == wanted.name)  # type: ignore[misc]
    ended.set()
    for thread in threads:
        thread.join()
    assert not failures and seen == {(name, texts[name]) for name in ("v1", "v2")}


def test_before_the_first_version_the_base_model_answers(served: Served) -> None:
    link = served.ws.current
    target = os.readlink(link)
    link.unlink()
    served.eventually(lambda: served.ask(max_tokens=1).system_fingerprint == "base")
    link.symlink_to(target)
    served.eventually(lambda: served.ask(max_tokens=1).system_fingerprint == "v2")


def test_a_changed_version_does_not_serve(served: Served) -> None:
    weights = served.ws.versions / "v1" / "adapter_config.json"
    kept = weights.read_bytes()
    served.ask("v2")
    try:
        served.ws.promote("v1", force=True)
        weights.write_bytes(kept.replace(b'"r": 8', b'"r": 4'))
        fresh = Served(served.ws, served.log.with_name("tampered.log"))
        try:
            # From the start nothing can answer to `current`; versions by name can.
            with pytest.raises(urllib.error.HTTPError, match="503") as unready:
                fresh.get("/readyz")
            assert "was changed since" in json.loads(unready.value.read())["problem"]
            with pytest.raises(openai.APIStatusError, match="nothing answers to `current`"):
                fresh.ask()
            assert fresh.ask("v2").system_fingerprint == "v2"
            fresh.ws.promote("v2", force=True)
            fresh.eventually(lambda: 'treering_serving{version="v2"} 1.0' in fresh.get("/metrics"))
            with pytest.raises(openai.APIStatusError) as found:
                fresh.ask("v1")
            assert found.value.status_code == 503 and "was changed since" in str(found.value.body)
            # `current` may point there, but what served before goes on.
            served_before = fresh.ask().system_fingerprint
            fresh.ws.current.unlink()
            fresh.ws.current.symlink_to("versions/v1")
            fresh.eventually(lambda: "was changed since" in json.loads(fresh.get("/readyz"))["problem"])
            assert fresh.ask().system_fingerprint == served_before == "v2"
        finally:
            served.ws.current.unlink()
            served.ws.current.symlink_to("versions/v2")
            assert fresh.stop() == 0
    finally:
        weights.write_bytes(kept)


def test_a_dead_worker_is_replaced_and_whole_answers_outlive_it(served: Served) -> None:
    long: dict[str, Any] = {"model": "base", "messages": LONG, "max_tokens": 800, "logit_bias": {257: -100}}
    asked = [long, {**long, "temperature": 1.0, "seed": 3}]
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(served.ask, **settings) for settings in asked]
        served.eventually(lambda: "treering_answers_under_way 2.0" in served.get("/metrics"))
        stream = served.ask(**long, stream=True)
        next(stream)  # All are being written.
        dead = served.worker()
        os.kill(dead, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="ended while it wrote"):
            list(stream)
        answer = served.ask(max_tokens=3)  # Sent while there is no worker: it waits for the next one.
    assert answer.system_fingerprint == "v2" and served.worker() != dead
    for settings, whole in zip(asked, answers, strict=True):
        assert whole.result().usage.completion_tokens == 800
        assert whole.result().choices[0].message.content == served.ask(**settings).choices[0].message.content


def test_a_client_that_leaves_makes_room(served: Served) -> None:
    for _ in range(12):  # More than there is room for, one after the other.
        stream = served.ask(messages=LONG, model="base", max_tokens=1900, stream=True)
        next(stream)
        stream.close()
        served.eventually(lambda: "treering_answers_under_way 0.0" in served.get("/metrics"))
    impatient = served.client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model="base", messages=LONG, max_tokens=1900)
    served.eventually(lambda: "treering_answers_under_way 0.0" in served.get("/metrics"))
    assert served.ask(n=8, temperature=1).choices[7].message.content is not None


def test_metrics_and_log(served: Served) -> None:
    served.ask("v1")
    page = served.get("/metrics")
    assert re.search(r'treering_requests_total{path="/v1/chat/completions",status="200",version="v1"} [1-9]', page)
    assert 'treering_serving{version="v2"} 1.0' in page and "treering_engine_up 1.0" in page
    with pytest.raises(urllib.error.HTTPError):
        served.get("/nowhere/at/all")
    served.eventually(lambda: 'path="unknown",status="404"' in served.get("/metrics"))
    lines = [json.loads(line) for line in served.log.read_text().splitlines() if line.startswith("{")]
    line = next(line for line in reversed(lines) if line["path"] == "/v1/chat/completions")
    assert line["version"] == "v1" and line["status"] == 200 and line["prompt_tokens"] > 0
    assert "sort d" not in served.log.read_text()  # No contents unless asked.


def test_feedback_waits_for_its_review(served: Served) -> None:
    said = {"messages": ASK, "answer": "a b", "rating": "down", "correction": "a d", "task": "a"}
    said["response_id"] = served.ask(max_tokens=1).id
    answer = served.client.post("/feedback", body=said, cast_to=dict[str, str])
    assert answer["state"] == "waiting"
    [entry] = feedback.waiting(feedback.read(served.ws))
    assert entry.id == answer["id"] and entry.feedback.correction == "a d" and entry.feedback.version == "v2"
    assert not list(served.ws.inbox.rglob("feedback*"))
    with pytest.raises(openai.BadRequestError, match="rating"):
        served.client.post("/feedback", body={"messages": ASK}, cast_to=dict[str, str])


def test_the_api_does_what_its_page_says(trained: Workspace, tmp_path: Path) -> None:
    """No crash, no answer that the page does not name; and every route is reached."""
    ws = Workspace(shutil.copytree(trained.root, tmp_path / "ws", symlinks=True))
    _, key = keys.create(ws, "drawn", "admin")
    running = Served(ws, tmp_path / "serve.log")
    try:
        found = met(running.url, key, 6)
    finally:
        assert running.stop() == 0
    assert len(found) >= 13
    assert [route for route, statuses in found.items() if not any(200 <= status < 300 for status in statuses)] == []
    assert "Traceback" not in running.log.read_text()


def test_only_loopback_names_are_answered(served: Served) -> None:
    asked = urllib.request.Request(served.url + "/healthz", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(asked, timeout=10)
    assert json.loads(served.get("/healthz")) == {"status": "ok"}


def test_keys_scopes_and_limits(served: Served) -> None:
    def admin(path: str, key: str, body: dict[str, Any]) -> Any:
        head = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        asked = urllib.request.Request(served.url + path, json.dumps(body).encode(), head)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.loads(answer.read())

    with pytest.raises(urllib.error.HTTPError, match="401"):  # Admin routes want a key even on loopback.
        admin("/admin/rollback", "any", {})
    made, secret = keys.create(served.ws, "app", requests_per_minute=2)
    keeper, keeper_secret = keys.create(served.ws, "ops", "admin")
    try:
        assert secret not in (served.ws.root / keys.FILE).read_text()
        with pytest.raises(openai.AuthenticationError, match="treering keys create"):
            served.ask()
        with_key = served.client.with_options(api_key=secret)
        assert with_key.chat.completions.create(model="current", messages=ASK, max_tokens=1).id
        with pytest.raises(urllib.error.HTTPError, match="403"):
            admin("/admin/rollback", secret, {})
        assert with_key.models.list().data
        with pytest.raises(openai.RateLimitError, match="2 times a minute") as found:
            with_key.models.list()
        assert 1 <= int(found.value.response.headers["retry-after"]) <= 61
        assert admin("/admin/rollback", keeper_secret, {}) == {"current": "v1", "serving": "v1"}
        assert admin("/admin/promote", keeper_secret, {"version": "v2", "force": True})["serving"] == "v2"
        with pytest.raises(urllib.error.HTTPError, match="400"):
            admin("/admin/promote", keeper_secret, {"version": "v9"})
    finally:
        keys.revoke(served.ws, made.id)
        revoked = served.client.with_options(api_key=secret)
        with pytest.raises(openai.AuthenticationError):
            revoked.models.list()
        keys.revoke(served.ws, keeper.id)
        with pytest.raises(openai.AuthenticationError, match="the last key was revoked"):
            served.ask()
        (served.ws.root / keys.FILE).unlink()
    assert served.ask().system_fingerprint == "v2"


@pytest.mark.parametrize("tasks", ["a", pytest.param("ab", marks=pytest.mark.soak)])
def test_a_dropped_file_becomes_a_version_that_answers(tmp_path: Path, model_folder: Path, tasks: str) -> None:
    """`treering run` closes the loop: nobody calls anything, the server answers all along."""
    settings: dict[str, Any] = {"learning_rate": 0.01, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    ws = Workspace.create(
        tmp_path / "ws",
        model_name_or_path=str(model_folder),
        bf16=False,
        gate={"margin": 1.0, "floor": 1.0},
        automate={"settle_seconds": 0.2},
        **settings,
    )
    running = Served(ws, tmp_path / "run.log", "run")
    try:
        assert running.ask(max_tokens=1).system_fingerprint == "base"
        for number, task in enumerate(tasks, start=1):
            folder = ws.inbox / task
            folder.mkdir()
            lines = "".join(json.dumps(row) + "\n" for row in toy_rows(task))
            (folder / "rows.jsonl").write_text(lines)
            learned = f"v{number}"
            running.eventually(lambda: running.ask(max_tokens=1).system_fingerprint == learned, 300, pause=0.2)  # noqa: B023
    finally:
        assert running.stop() == 0
    assert "Traceback" not in running.log.read_text()


def test_others_than_loopback_want_a_key(trained: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    from treering.cli import run

    assert run(["serve", "-w", str(trained.root), "--host", "0.0.0.0"]) == 3
    assert "treering keys create" in capfd.readouterr().err


def test_a_taken_port_is_told(trained: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    from treering.cli import run

    with socket.create_server(("127.0.0.1", 0)) as other:
        assert run(["serve", "-w", str(trained.root), "--port", str(other.getsockname()[1])]) == 3
    assert "take another" in capfd.readouterr().err


def test_a_missing_model_ends_with_its_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from treering.cli import run

    Workspace.create(tmp_path / "ws", model_name_or_path="./not-here")
    assert run(["serve", "-w", str(tmp_path / "ws"), "--port", "0"]) == 1
    assert "no such folder" in capfd.readouterr().err


def test_a_version_of_all_weights_and_a_template_with_tools(tmp_path: Path) -> None:
    """Full weights serve too; tools are shown to the model; contents are logged where that was asked for.

    And SIGTERM finishes what is under way.
    """
    folder = tiny_model(tmp_path / "model")
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(template)
    settings: dict[str, Any] = {"finetuning_type": "full", "protect": [], "serve": {"log_contents": True}}
    ws = Workspace.create(tmp_path / "ws", model_name_or_path=str(folder), bf16=False, max_steps=2, **settings)
    ws.ingest(toy_rows("a"), task="a")
    version = ws.update()
    assert version is not None
    ws.promote("v1", force=True)
    running = Served(ws, tmp_path / "serve.log")
    try:
        tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
        answer = running.ask()
        assert answer.system_fingerprint == "v1"
        assert running.ask(tools=tools).usage.prompt_tokens > answer.usage.prompt_tokens
        assert running.ask(tools=tools, tool_choice="none").usage == answer.usage
        assert "sort d" in running.log.read_text()
        stream = running.ask("base", messages=LONG, max_tokens=300, stream=True)
        events = [next(stream)]
    finally:
        running.process.send_signal(signal.SIGTERM)
    events += list(stream)
    assert events[-1].choices[0].finish_reason in ("stop", "length")
    assert running.process.wait(60) == 0
    assert "Traceback" not in running.log.read_text()


def test_a_written_call_comes_back_as_a_tool_call() -> None:
    from treering.serve.answers import Shape
    from treering.serve.engine import Piece

    shape = Shape("id", "chat.completion", "current", "v1", tools=True)
    text = 'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    choice = shape.whole([[Piece(text=text, finish="stop")]])["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    event = shape.chunk(0, [Piece(text=text, finish="stop")])
    assert event is not None
    delta = event["choices"][0]["delta"]
    assert delta["tool_calls"][0]["index"] == 0 and delta["role"] == "assistant"


def test_what_does_not_finish_before_the_end_hears_why(trained: Workspace, tmp_path: Path) -> None:
    config = trained.root / "treering.yaml"
    before = config.read_text()
    config.write_text(before.replace("serve:\n", "serve:\n  shutdown_timeout: 0.5\n"))
    try:
        running = Served(trained, tmp_path / "serve.log")
    finally:
        config.write_text(before)
    endless: dict[str, Any] = {"messages": LONG, "logit_bias": {"257": -100}, "max_tokens": 100_000}  # No end mark.
    stream = running.ask("base", stream=True, **endless)
    next(stream)
    with ThreadPoolExecutor(1) as threads:
        whole = threads.submit(running.ask, "base", **endless)
        running.eventually(lambda: "treering_answers_under_way 2.0" in running.get("/metrics"))
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the server is shutting down") as found:
            whole.result()
    assert found.value.status_code == 503
    assert running.process.wait(60) == 0
    assert "Traceback" not in running.log.read_text()
    ends = [json.loads(line) for line in running.log.read_text().splitlines() if '"path"' in line and "chat" in line]
    assert [end["status"] for end in ends] == [503, 503]


def test_a_wrong_stream_has_the_status_of_a_wrong_request(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="has more than"):
        served.ask("base", messages=[{"role": "user", "content": "x" * 19_000}], stream=True)


def test_the_log_counts_what_a_client_that_left_had(served: Served) -> None:
    stream = served.ask("base", messages=LONG, max_tokens=1500, stream=True, logit_bias={"257": -100})
    next(stream)
    next(stream)
    stream.close()

    def left() -> list[dict[str, Any]]:
        lines = served.log.read_text().splitlines()
        return [json.loads(line) for line in lines if '"status": 499' in line and '"completion_tokens": 0' not in line]

    served.eventually(lambda: bool(left()))
    [end] = left()[-1:]
    assert end["prompt_tokens"] > 20 and 1 <= end["completion_tokens"] < 1500 and end["first_token_seconds"] > 0


def test_the_first_token_is_timed_where_it_is_sent(served: Served) -> None:
    def count() -> float:
        [line] = [line for line in served.get("/metrics").splitlines() if "first_token_seconds_count" in line]
        return float(line.split()[-1])

    before = count()
    served.ask("base", max_tokens=2)
    assert count() == before
    list(served.ask("base", max_tokens=2, stream=True))
    served.eventually(lambda: count() == before + 1)
