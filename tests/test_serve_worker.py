"""The generating process from inside: what it writes, in which order, and that a request only ever breaks itself."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from tests.serving import ASK, LONG, greedy
from treering import Workspace
from treering.errors import ModelError
from treering.router import OWN
from treering.serve.adapters import Adapter
from treering.serve.batch import Batch
from treering.serve.engine import BASE, EngineError, Job
from treering.serve.grammars import MOST_WAITING, Grammars
from treering.serve.texts import Texts
from treering.serve.versions import Loaded, Read
from treering.serve.worker import Worker
from treering.testing import toy_rows

Message = dict[str, Any]


class Inside:
    """A worker in this process. `then` is called with each event, and may `put` more."""

    def __init__(self, ws: Workspace) -> None:
        self.inbox: SimpleQueue[Message | None] = SimpleQueue()
        self.events: list[Message] = []
        self.then: Callable[[Message], None] = lambda _: None
        self.worker = Worker(ws.root, ws.config(), self.inbox, self._send)

    def _send(self, event: Message) -> None:
        self.events.append(event)
        self.then(event)

    def put(self, **message: Any) -> None:
        self.inbox.put(message)

    def generate(self, id: str, version: str = "base", **settings: Any) -> None:
        asked = {} if "prompt" in settings else {"messages": ASK}
        self.put(op="generate", job=dict(Job(id=id, version=version, **{"max_tokens": 12, **asked, **settings})))

    def run(self, ends: int) -> None:
        """Until so many requests have ended."""

        def send(event: Message) -> None:
            self._send(event)
            if sum(self.ended(event) for event in self.events) == ends:
                self.inbox.put(None)

        self.worker._send = send
        self.worker.run()

    def ended(self, event: Message) -> bool:
        return event["event"] in ("failed", "embedded") or bool(event.get("finish"))

    def text(self, id: str) -> str:
        return "".join(event.get("text", "") for event in self.events if event.get("id") == id)

    def failure(self, id: str) -> tuple[int, str]:
        [event] = [event for event in self.events if event["event"] == "failed" and event["id"] == id]
        return event["status"], event["error"]


@pytest.fixture
def inside(trained: Workspace) -> Inside:
    return Inside(trained)


def test_versions_mixed_in_a_batch_write_what_each_writes_alone(inside: Inside, trained: Workspace) -> None:
    wanted = {name: greedy(trained, name, ASK, 12) for name in ("base", "v1", "v2")}
    assert len(set(wanted.values())) == 3
    together: set[str] = set()

    def note(_: Message) -> None:
        rows = inside.worker._loaded.batches()[0].rows
        together.update(row.owner.job.version for row in rows if len({r.slot for r in rows}) == 3)

    inside.then = note
    for name in wanted:
        inside.put(op="load", version=name, keep=False)
        inside.generate(f"{name}-a", name)
        inside.generate(f"{name}-b", name, messages=LONG, max_tokens=100)
    inside.run(6)
    assert together == set(wanted)
    for name, text in wanted.items():
        assert inside.text(f"{name}-a") == text
        assert inside.text(f"{name}-b") == greedy(trained, name, LONG, 100)


@pytest.mark.parametrize(
    "values",
    [{"use_dora": True}, {"use_rslora": True}, {"additional_target": "lm_head"}],
    ids=lambda values: min(values),
)
def test_every_kind_of_adapter_is_served(workspace: Callable[..., Workspace], values: dict[str, Any]) -> None:
    ws = workspace(learning_rate=0.01, max_steps=3, protect=[], **values)
    ws.ingest(toy_rows("a"), task="a")
    assert ws.update() is not None
    inside = Inside(ws)
    inside.put(op="load", version="v1", keep=False)
    for version in ("base", "v1"):
        inside.generate(version, version)
    inside.run(2)
    assert len(inside.worker._loaded.batches()) == (1 if "use_rslora" in values else 2)  # A model of its own.
    for version in ("base", "v1"):
        assert inside.text(version) == greedy(ws, version, ASK, 12)
    assert inside.text("base") != inside.text("v1")


def test_nobody_waits_for_anothers_schema(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, build = threading.Event(), Grammars._build

    def slowly(self: Grammars, text: str) -> Any:
        assert go_on.wait(60)
        return build(self, text)

    monkeypatch.setattr(Grammars, "_build", slowly)
    inside.generate("slow", json_schema={"enum": ["ab"]})
    inside.generate("left", json_schema={"enum": ["cd"]})
    inside.generate("other")

    def release(event: Message) -> None:
        if event.get("id") == "other" and event.get("finish"):
            inside.put(op="cancel", id="left")
            go_on.set()

    inside.then = release
    inside.run(2)
    assert inside.text("other") and inside.text("slow") == '"ab"'
    assert not any(event.get("id") == "left" for event in inside.events)


def test_schemas_that_nobody_waits_for_are_not_read(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, build, read = threading.Event(), Grammars._build, list[str]()

    def slowly(self: Grammars, text: str) -> Any:
        read.append(text)
        assert go_on.wait(60)
        return build(self, text)

    monkeypatch.setattr(Grammars, "_build", slowly)
    for number in range(MOST_WAITING + 1):
        inside.generate(f"schema {number}", json_schema={"enum": [f"{number}"]})
    inside.generate("other")

    def leave(event: Message) -> None:
        if event.get("id") == "other" and event.get("finish"):
            for number in range(1, MOST_WAITING):
                inside.put(op="cancel", id=f"schema {number}")
            inside.generate("last", json_schema={"enum": ["ab"]})
            inside.put(op="ping")
        if event["event"] == "pong":
            go_on.set()

    inside.then = leave
    inside.run(4)
    assert inside.failure(f"schema {MOST_WAITING}") == (
        429,
        f"{MOST_WAITING} other JSON schemas are being read; try again in some seconds",
    )
    assert inside.text("last") == '"ab"'
    assert read == ['{"enum": ["0"]}', '{"enum": ["ab"]}']


def test_a_schema_that_is_too_much_fails_and_does_not_end_well(inside: Inside) -> None:
    wide = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(700)}}
    inside.generate("wide", json_schema=wide)
    inside.run(1)
    assert inside.failure("wide")[0] == 400
    assert "cannot be followed: " in inside.failure("wide")[1]


def test_what_fails_again_and_again_is_not_held(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure is raised anew: the one that is kept would hold all that its raising has passed."""
    raised, fail = list[EngineError](), Worker._fail

    def seen(self: Worker, id: str, error: EngineError) -> None:
        raised.append(error)
        fail(self, id, error)

    monkeypatch.setattr(Worker, "_fail", seen)
    for number in range(3):
        inside.generate(f"long {number}", messages=[{"role": "user", "content": "x" * 5000}])
        inside.generate(f"odd {number}", json_schema={"enum": []})
    inside.run(6)
    assert len({id(error) for error in raised}) == 6
    assert {str(error) for error in raised} == {inside.failure("long 0")[1], inside.failure("odd 0")[1]}
    depths = [len(list(traceback.walk_tb(error.__traceback__))) for error in raised]
    assert max(depths) < 8


def test_where_prompts_find_no_memory_what_is_kept_makes_room(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    join, full = Batch.join, [NO_MEMORY]

    def once_full(batch: Batch[Any], rows: Any) -> None:
        if full:
            raise full.pop()
        join(batch, rows)

    monkeypatch.setattr(Batch, "join", once_full)
    monkeypatch.setattr(Batch, "forget", lambda batch: True)
    inside.generate("large", messages=LONG)
    inside.run(1)
    assert inside.text("large") and not full


def test_a_request_breaks_only_itself(inside: Inside) -> None:
    inside.generate("well", max_tokens=40)
    inside.generate("cold", temperature=1e-40)
    inside.generate("half", messages=[{"role": "user", "content": "a\ud800"}])
    inside.generate("half-prompt", prompt="\udc00")
    inside.put(op="embed", id="half-text", version="base", texts=["x", "\ud800"])
    inside.generate("nan", logit_bias={65: float("nan")})
    inside.generate("odd-schema", json_schema={"const": "\ud800"})
    inside.put(op="generate", job={"id": "odd-job", "version": 5})
    inside.put(op="embed", id="odd-texts", version="base", texts=[5])
    inside.generate("biased", logit_bias=dict.fromkeys(range(301), 1.0))
    inside.run(10)
    assert inside.text("cold") == inside.text("well")[: len(inside.text("cold"))] != ""
    for id in ("half", "half-prompt", "half-text"):
        assert inside.failure(id)[0] == 400 and "half a character, U+D" in inside.failure(id)[1]
    assert inside.failure("nan")[0] == 500 and "no token a score" in inside.failure("nan")[1]
    assert inside.failure("odd-schema")[0] == inside.failure("biased")[0] == 400
    assert inside.failure("odd-job")[0] == inside.failure("odd-texts")[0] == 500
    assert not inside.worker._loaded.batches()[0].rows


NO_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


def test_prompts_that_cannot_be_read_break_only_themselves(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"large": NO_MEMORY, "odd": IndexError("odd")}
    read = Batch.read

    def full(batch: Batch[Any], tokens: int) -> Any:
        for row in batch.reading:
            if row.owner.job.id in errors:
                raise errors[row.owner.job.id]
        return read(batch, tokens)

    monkeypatch.setattr(Batch, "read", full)

    def then(event: Message) -> None:
        if event.get("id") == "first" and len(inside.events) == 2:
            inside.generate("large", messages=LONG)
            inside.generate("odd", prompt="x" * 200)

    inside.then = then
    inside.generate("first")
    inside.run(3)
    assert inside.failure("large") == (503, inside.failure("large")[1]) and "no memory" in inside.failure("large")[1]
    assert inside.failure("odd")[0] == 500 and len(inside.text("first")) > 5


def test_prompts_that_cannot_join_break_only_themselves(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    join = Batch.join

    def full(batch: Batch[Any], rows: Any) -> None:
        if rows[0].owner.job.id == "large":
            raise NO_MEMORY
        join(batch, rows)

    monkeypatch.setattr(Batch, "join", full)
    inside.generate("large", messages=LONG)
    inside.generate("small", prompt="x" * 100)
    inside.run(2)
    assert inside.failure("large")[0] == 503 and inside.text("small")


def test_where_a_step_finds_no_memory_the_last_to_come_makes_room(
    inside: Inside, trained: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Batch.step

    def full(batch: Batch[Any]) -> Any:
        if len(batch.running) > 1:
            raise NO_MEMORY
        return step(batch)

    monkeypatch.setattr(Batch, "step", full)
    inside.generate("first", max_tokens=10)
    inside.generate("second", max_tokens=10)
    inside.run(2)
    assert inside.failure("second")[0] == 503 and inside.text("first") == greedy(trained, "base", ASK, 10)


def test_what_is_wrong_with_all_ends_the_process(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise torch.AcceleratorError("device-side assert")

    for place in ("read", "step"):
        monkeypatch.setattr(Batch, place, broken)
        inside.generate(place)
        with pytest.raises(torch.AcceleratorError):
            inside.run(1)
        monkeypatch.undo()


def test_a_long_prompt_is_read_while_others_write(inside: Inside, trained: Workspace) -> None:
    order: list[str] = []
    inside.worker._slice = 16

    def then(event: Message) -> None:
        if event["event"] == "piece":
            order.append(event["id"])
            if order == ["writes"]:
                inside.generate("long", prompt="x" * 200, max_tokens=1)
                inside.generate("short", prompt="y", max_tokens=1)

    inside.then = then
    inside.generate("writes", max_tokens=30)
    inside.run(3)
    assert order.index("short") < 6 < order.index("long")  # Some of the twelve steps write no text.
    assert inside.text("writes") == greedy(trained, "base", ASK, 30)


def test_a_prompt_far_too_long_is_not_tokenised(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    tokenizer = inside.worker._prompts._tokenizer

    def noted(text: str, **settings: Any) -> Any:
        sizes.append(len(text))
        return tokenizer(text, **settings)

    noted.apply_chat_template = tokenizer.apply_chat_template  # type: ignore[attr-defined]
    monkeypatch.setattr(inside.worker._prompts, "_tokenizer", noted)
    for choice in range(3):
        inside.generate(f"far-{choice}", messages=[{"role": "user", "content": "x" * 1_000_000}])
    inside.generate("blank", prompt="x" * 3000)
    inside.run(4)
    head = 8 * inside.worker._context
    assert sizes == [head, 3000]  # What a request asks for is read once, for all its answers.
    assert inside.failure("far-2")[0] == 400 and "the prompt has more than 163" in inside.failure("far-2")[1]
    assert "has 3000 tokens" in inside.failure("blank")[1]


def test_every_piece_says_how_far_it_is(inside: Inside) -> None:
    inside.generate("x", prompt="abc", max_tokens=4)
    inside.run(1)
    pieces = [event for event in inside.events if event["event"] == "piece"]
    assert [(piece["prompt_tokens"], piece["completion_tokens"]) for piece in pieces] == [(3, n) for n in (1, 2, 3, 4)]


def test_what_nobody_waits_for_goes_last(workspace: Callable[..., Workspace]) -> None:
    inside = Inside(workspace(serve={"max_batch_size": 1}))
    for name, background in (("shadow", True), ("one", False), ("two", False)):
        inside.generate(name, background=background, max_tokens=2)
    inside.run(3)
    assert [event["id"] for event in inside.events if inside.ended(event)] == ["one", "two", "shadow"]


def test_prompts_that_make_one_slice_are_read_together(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []
    join = Batch.join

    def noted(batch: Batch[Any], rows: Any) -> None:
        sizes.append([len(row.prompt) for row in rows])
        join(batch, rows)

    monkeypatch.setattr(Batch, "join", noted)
    for name, size in (("a", 100), ("b", 1), ("c", 60), ("d", 1), ("e", 300)):
        inside.generate(name, prompt="x" * size, max_tokens=1)
    inside.run(5)
    assert inside.worker._slice == 128
    assert sizes == [[100], [1, 60], [1], [300]] or sizes == [[100], [1, 60, 1], [300]]


def test_a_model_with_another_cache_is_refused_at_the_start(
    workspace: Callable[..., Workspace], model_folder: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(model_folder, tmp_path / "sliding"))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"sliding keeps DynamicSlidingWindowLayer .* set model_name_or_path"):
        Inside(workspace(model_name_or_path=str(folder)))


# Embeddings


def test_texts_are_taken_a_few_at_a_time() -> None:
    texts = Texts("id", "base", [[1] * length for length in (3, 300, 2, 600, 4)])
    taken = []
    while texts.left:
        taken.append(texts.next(512))
    assert taken == [[3], [1], [2, 0, 4]]


def test_answers_go_on_while_texts_are_embedded(inside: Inside, trained: Workspace) -> None:
    texts = ["x" * 400] * 20
    inside.put(op="embed", id="many", version="base", texts=texts)
    inside.generate("answer", max_tokens=10)
    inside.run(2)
    kinds = [event["event"] for event in inside.events[1:]]
    assert kinds.count("vector") == 20 and kinds[-1] == "embedded"
    assert kinds.index("piece") < 3 and "vector" in kinds[kinds.index("piece") : kinds.index("piece") + 5]
    assert inside.text("answer") == greedy(trained, "base", ASK, 10)
    vectors = {event["at"]: event["vector"] for event in inside.events if event["event"] == "vector"}
    *_, alone = inside.worker._loaded.batches()[0].embed([inside.worker._prompts.text(texts[0])], 0, 1000)
    assert alone is not None
    assert vectors[0] == pytest.approx(alone[0].tolist(), abs=1e-5) and len(vectors) == 20


def test_embedding_ends_when_its_client_leaves(inside: Inside) -> None:
    def then(event: Message) -> None:
        if event["event"] == "vector" and event["at"] == 4:
            inside.put(op="cancel", id="many")
            inside.generate("after", max_tokens=1)

    inside.then = then
    inside.put(op="embed", id="many", version="base", texts=["x" * 600] * 5 + ["y" * 700] * 20)
    inside.put(op="embed", id="few", version="base", texts=["x"] * 5)
    inside.run(2)
    assert sum(event["event"] == "vector" and event["id"] == "many" for event in inside.events) < 5
    assert not inside.worker._texts


def test_texts_wait_for_a_version_that_went(inside: Inside) -> None:
    def then(event: Message) -> None:
        homes = inside.worker._loaded._homes
        if event.get("at") == 1 and "v1" in homes:
            del homes["v1"]

    inside.then = then
    inside.put(op="embed", id="two", version="v1", texts=["x" * 500, "y" * 600])
    inside.run(1)
    assert [event["at"] for event in inside.events if event["event"] == "vector"] == [1, 0]
    assert [event["event"] for event in inside.events].count("reading") == 2


# Places


class Places(Loaded):
    """Versions that are read at once, as empty adapters; those in `damaged` cannot be."""

    damaged: set[str]

    def _read(self, name: str) -> Read:
        if name in self.damaged:
            raise ModelError(f"{name} is damaged")
        return Read({OWN: Adapter({})}, None, None)


@pytest.fixture
def places(workspace: Callable[..., Workspace], model_folder: Path) -> Callable[[int], Places]:
    def make(count: int) -> Places:
        config = workspace(f"ws{count}", serve={"max_loaded_versions": count}).config()
        made = Places(Path(), model_folder, config, 0, begun.append)
        made.damaged = set()
        return made

    begun: list[str] = []
    return make


def settled(loaded: Loaded, running: set[str] = frozenset(), waiting: set[str] = frozenset()) -> dict[str, str | None]:  # type: ignore[assignment]
    """All that can be put in place now."""
    done: dict[str, str | None] = {}
    for _ in range(20):
        if loaded._reading is not None:
            loaded._reading[1].exception(10)
        done |= loaded.settle(running, waiting)
    return done


def there(loaded: Loaded) -> list[str]:
    return [name for name in loaded._homes if name != BASE]


def test_the_next_to_be_kept_waits_for_nobody(places: Callable[[int], Places]) -> None:
    for count in (1, 2, 3):
        loaded = places(count)
        busy = {f"v{number}" for number in range(1, count + 1)}
        loaded.want("v1", keep=True)
        for name in sorted(busy):
            loaded.want(name)
        settled(loaded, busy)
        loaded.want("v9", keep=True)
        assert settled(loaded, busy) == {"v9": None}
        assert set(there(loaded)) == busy | {"v9"}
        settled(loaded)  # Later it has its place among the others.
        assert len(there(loaded)) == count and "v9" in there(loaded)


def test_what_is_kept_stays_however_long_it_is_not_used(places: Callable[[int], Places]) -> None:
    for count in (1, 2):
        loaded = places(count)
        loaded.want("v1", keep=True)
        settled(loaded)
        for number in range(2, 6):
            loaded.want(f"v{number}")
            assert settled(loaded, waiting={f"v{number}"}) == {f"v{number}": None}
            assert there(loaded) == ["v1", f"v{number}"]


def test_a_damaged_version_takes_no_place(places: Callable[[int], Places]) -> None:
    loaded = places(1)
    loaded.damaged = {"v2", "v3"}
    loaded.want("v1")
    settled(loaded)
    loaded.want("v2")
    loaded.want("v3", keep=True)
    assert settled(loaded) == {"v2": "v2 is damaged", "v3": "v3 is damaged"}
    assert there(loaded) == ["v1"]


def test_an_adapter_that_does_not_fit_takes_no_place(
    places: Callable[[int], Places], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = places(1)
    loaded.want("v1")
    settled(loaded)
    weights = {"model.nowhere": (torch.zeros(2, 3), torch.zeros(3, 2))}
    monkeypatch.setattr(loaded, "_read", lambda _: Read({OWN: Adapter(weights)}, None, None))
    loaded.want("v2")
    reason = settled(loaded)["v2"]
    assert reason is not None and "no linear layer" in reason and there(loaded) == ["v1"]


def test_where_all_places_are_busy_one_takes_no_new_answers(places: Callable[[int], Places]) -> None:
    loaded = places(2)
    for name in ("v1", "v2"):
        loaded.want(name)
    settled(loaded)
    loaded.want("v3")
    assert settled(loaded, {"v1", "v2"}, {"v1", "v2", "v3"}) == {}
    assert loaded.home("v1") is None and loaded.home("v2") is not None
    # Answers wait for v1 too, but v3 was first: else a busy version would never leave.
    assert settled(loaded, {"v2"}, {"v1", "v2", "v3"}) == {"v3": None}
    assert there(loaded) == ["v2", "v3"] and loaded.home("v2") is not None


def test_answers_that_wait_for_a_version_keep_it(places: Callable[[int], Places]) -> None:
    loaded = places(2)
    for name in ("v1", "v2"):
        loaded.want(name)
    settled(loaded)
    loaded.want("v3")
    assert settled(loaded, waiting={"v1"}) == {"v3": None}
    assert there(loaded) == ["v1", "v3"]


def test_one_version_is_read_at_a_time(places: Callable[[int], Places]) -> None:
    loaded = places(1)
    loaded.want("v1")
    settled(loaded)
    for name in ("v2", "v3", "v4"):
        loaded.want(name)
    settled(loaded, {"v1"})
    assert loaded._reading is not None and loaded._reading[0] == "v2" and list(loaded._wanted) == ["v3", "v4"]
    loaded.want("v9", keep=True)  # What is to be kept does not wait behind it.
    assert settled(loaded, {"v1"}) == {"v9": None}
