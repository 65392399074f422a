"""A version on trial: who meets it, what is counted of it, and that no user ever has trouble with it."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from fastapi.testclient import TestClient
from scipy.stats import binom

from tests.serving import ASK, LONG, Served
from treering import Workspace, canary, feedback, figures, registry
from treering.errors import TreeringError, UsageError
from treering.feedback import Feedback
from treering.figures import Line
from treering.serve import keys
from treering.serve.app import create_app
from treering.serve.engine import Embeddings, EngineError, Job, Piece
from treering.serve.trial import MANY_KEYS, Trial, place

NOW = datetime(2026, 11, 22, 4, tzinfo=UTC)


@pytest.fixture
def ws(trained: Workspace, tmp_path: Path) -> Workspace:
    """v1 and v2, of which v2 is current."""
    copied = Workspace(shutil.copytree(trained.root, tmp_path / "ws", symlinks=True))
    here = registry.current(copied)
    if here is None or here.name != "v2":
        copied.promote("v2", force=True)
    return copied


# What is on trial


def test_it_begins_and_ends(ws: Workspace) -> None:
    made = canary.start(ws, "v1", force=True)
    assert (made.version, made.mode, made.share, made.ended) == ("v1", "canary", canary.SHARE, None)
    assert canary.read(ws.root) == made
    shadow = canary.start(ws, "v1", shadow=True)
    assert (shadow.mode, shadow.share) == ("shadow", None)
    over = canary.stop(ws)
    assert over is not None and over.ended is not None and over.reason == "turned off"
    assert canary.stop(ws) == over
    assert canary.running(ws.root) is None


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("v9", {}, "there is no version 'v9'"),
        ("v2", {}, "is current and answers every request"),
        ("v1", {"share": 0.0}, "--share 0 is no share"),
        ("v1", {"share": 1.5}, "--share 1.5 is no share"),
        ("v1", {"share": 0.5, "shadow": True}, "not both"),
    ],
)
def test_what_cannot_be_tried_is_refused(ws: Workspace, name: str, how: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        canary.start(ws, name, **how)
    assert canary.read(ws.root) is None


def test_users_meet_what_the_gate_held_only_by_force(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.Version, "promote", property(lambda _: False))
    with pytest.raises(UsageError, match="was held by the gate"):
        canary.start(ws, "v1")
    assert canary.start(ws, "v1", shadow=True).mode == "shadow"
    assert canary.start(ws, "v1", force=True).mode == "canary"


def test_two_versions_must_fit(ws: Workspace) -> None:
    settings = ws.root / "treering.yaml"
    settings.write_text(settings.read_text().replace("max_loaded_versions: 2", "max_loaded_versions: 1"))
    with pytest.raises(UsageError, match="set it to 2 or more"):
        canary.start(ws, "v1")


@pytest.mark.parametrize("how", ["promote", "rollback"])
def test_what_becomes_current_is_no_longer_on_trial(ws: Workspace, how: str) -> None:
    canary.start(ws, "v1", force=True)
    ws.promote("v1", force=True) if how == "promote" else ws.rollback()
    over = canary.read(ws.root)
    assert over is not None and over.ended is not None and over.reason == "v1 became current"


def test_another_promotion_goes_on_with_it(ws: Workspace) -> None:
    canary.start(ws, "v1", force=True)
    ws.promote("v2", force=True)
    assert canary.running(ws.root) is not None


@pytest.mark.parametrize("damage", ["{", '{"version": "v1"}', '{"version": "../x", "since": "2026-11-22T04:00:00Z"}'])
def test_a_damaged_file_is_told_and_can_be_mended(ws: Workspace, damage: str) -> None:
    path = ws.root / canary.FILE
    path.write_text(damage)
    with pytest.raises(TreeringError, match="treering canary --off"):
        canary.read(ws.root)
    ws.promote("v1", force=True)  # Nothing else minds.
    assert canary.stop(ws) is None and not path.exists()
    path.write_text(damage)
    assert canary.start(ws, "v2", force=True) == canary.read(ws.root)


# Who meets it


class Fake:
    """An engine that writes at once what it is told, and fails where it is told to."""

    alive = True

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.broken: dict[str, EngineError] = {}
        self.unloadable: dict[str, EngineError] = {}
        self.begun: set[str] = set()
        """Broken versions that fail only after their first token."""
        self.wait: asyncio.Event | None = None
        """What background jobs wait for."""
        self.stuck: set[str] = set()
        self.asked: Counter[str] = Counter()

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def load(self, version: str, *, keep: bool = False) -> None:
        if version in self.unloadable:
            raise self.unloadable[version]

    async def generate(self, job: Job) -> Any:
        self.asked[job.version] += 1
        if job.background and self.wait is not None:
            await self.wait.wait()
        if job.version in self.stuck:
            await asyncio.Event().wait()
        if job.version in self.broken:
            if job.version in self.begun:
                yield Piece(text="so")
            raise self.broken[job.version]
        yield Piece(text=self.answers.get(job.version, "the same "))
        yield Piece(text="end.", finish="stop", prompt_tokens=3, completion_tokens=2)

    async def embed(self, version: str, texts: list[str | list[int]]) -> Embeddings:
        return Embeddings(vectors=[[1.0] for _ in texts], tokens=1)


DEAD = EngineError("the process died", status=503, code="engine_restarted")


@contextmanager
def client_of(ws: Workspace, engine: Fake) -> Iterator[TestClient]:
    with TestClient(create_app(ws, engine), base_url="http://127.0.0.1") as client:
        assert client.portal is not None
        client.portal.call(cast(Any, client.app).state.server.open)
        yield client


def ask(client: TestClient, user: str | None = None, **more: Any) -> Any:
    body = {"model": "current", "messages": ASK, **({"user": user} if user else {}), **more}
    return client.post("/v1/chat/completions", json=body)


def trial_of(client: TestClient) -> Trial:
    return cast(Trial, cast(Any, client.app).state.server.trial)


def eventually(check: Callable[[], object]) -> None:
    wait = threading.Event()
    for _ in range(1000):
        if check():
            return
        wait.wait(0.01)
    raise AssertionError


def arms(ws: Workspace, version: str = "v1") -> dict[str, figures.Sum]:
    return {arm.arm: arm for arm in figures.figures(ws, version).arms}


async def _started(ws: Workspace, engine: Fake) -> Trial:
    from treering.serve.limits import Limits

    trial = Trial(ws, engine, Limits(8), ws.config().serve, lambda *_: None)
    await trial.look()
    return trial


def test_the_share_is_kept_and_a_user_sees_one_version(ws: Workspace) -> None:
    canary.start(ws, "v1", 0.2, force=True)
    trial = asyncio.run(_started(ws, Fake()))

    def arm(**who: Any) -> str | None:
        part = trial.part("current", "v2", **who)
        return part.arm if part else None

    users = {f"user {number}": arm(user=f"user {number}") for number in range(2000)}
    assert users == {user: arm(user=user) for user in users}
    few, many = binom.interval(1 - 1e-9, 2000, 0.2)
    assert few <= Counter(users.values())["canary"] <= many
    assert few <= Counter(arm() for _ in range(2000))["canary"] <= many
    # A key with all the traffic behind it is no user; one of many keys is.
    assert few <= Counter(arm(key="one", keys=MANY_KEYS - 1) for _ in range(2000))["canary"] <= many
    assert len({arm(key="one", keys=MANY_KEYS) for _ in range(100)}) == 1
    # Who tries one version need not try the next; who is in a small share is in a larger one.
    both = sum(place("v1", user) < 0.2 and place("v3", user) < 0.2 for user in users)
    assert both <= binom.ppf(1 - 1e-9, 2000, 0.04)


def test_only_requests_for_current_have_a_part(ws: Workspace) -> None:
    canary.start(ws, "v1", 1.0, force=True)
    trial = asyncio.run(_started(ws, Fake()))
    part = trial.part("current", "v2")
    assert part is not None and part.arm == "canary"
    assert [trial.part(name, "v2") for name in ("v1", "v2", "base")] == [None] * 3
    assert trial.part("current", "v1") is None  # It is current already.


@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_tells_its_version(ws: Workspace, stream: bool) -> None:
    canary.start(ws, "v1", 0.5, force=True)
    with client_of(ws, Fake()) as client:
        seen = set()
        for number in range(12):
            user = f"user {number}"
            wanted = "v1" if place("v1", user) < 0.5 else "v2"
            answer = ask(client, user, stream=stream)
            assert answer.headers["x-treering-version"] == wanted
            assert f'"system_fingerprint":"{wanted}"' in answer.text.replace(": ", ":")
            seen.add(wanted)
        assert seen == {"v1", "v2"}
        assert (
            client.post("/v1/embeddings", json={"model": "current", "input": "x"}).headers["x-treering-version"] == "v2"
        )
        assert 'treering_canary_requests_total{arm="canary",outcome="answered"}' in client.get("/metrics").text
    counted = arms(ws)
    assert counted["canary"].requests + counted["control"].requests == 12
    assert (counted["canary"].versions, counted["control"].versions) == (["v1"], ["v2"])
    assert counted["canary"].completion_tokens == 2 * counted["canary"].requests


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choices", [1, 2])
def test_what_it_cannot_answer_current_does(ws: Workspace, stream: bool, choices: int) -> None:
    engine = Fake()
    engine.broken["v1"] = DEAD
    canary.start(ws, "v1", 1.0, force=True)
    with client_of(ws, engine) as client:
        for _ in range(3):
            answer = ask(client, stream=stream, n=choices)
            assert answer.status_code == 200 and answer.headers["x-treering-version"] == "v2"
            assert "end." in answer.text and "died" not in answer.text and '"v1"' not in answer.text
        assert client.app.state.server.limits.inside == 0  # type: ignore[attr-defined]
    assert (arms(ws)["canary"].requests, arms(ws)["canary"].errors) == (3, 3)
    assert engine.asked["v1"] >= 3


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_it_too_long_current_answers(ws: Workspace, stream: bool) -> None:
    with (ws.root / "treering.yaml").open("a") as settings:
        settings.write("  request_timeout: 0.2\n")  # `serve` is the last group.
    engine = Fake()
    engine.stuck.add("v1")
    canary.start(ws, "v1", 1.0, force=True)
    with client_of(ws, engine) as client:
        answer = ask(client, stream=stream)
        assert answer.status_code == 200 and answer.headers["x-treering-version"] == "v2"
    assert (arms(ws)["canary"].requests, arms(ws)["canary"].errors) == (1, 1)


def test_a_version_that_cannot_be_loaded_is_asked_nothing(ws: Workspace) -> None:
    engine = Fake()
    engine.unloadable["v1"] = EngineError("a file was changed", status=503, code="version_unavailable")
    canary.start(ws, "v1", 1.0, force=True)
    with client_of(ws, engine) as client:
        eventually(lambda: "v1 is on trial and cannot answer: a file" in client.get("/readyz").json()["problem"])
        assert [ask(client).headers["x-treering-version"] for _ in range(2)] == ["v2", "v2"]
        assert engine.asked["v1"] == 0
        canary.stop(ws)
        eventually(lambda: client.get("/readyz").json()["problem"] == "")
    assert (arms(ws)["canary"].requests, arms(ws)["canary"].errors) == (2, 2)


def test_one_that_can_no_longer_be_loaded_is_asked_no_more(ws: Workspace) -> None:
    engine = Fake()
    engine.broken["v1"] = EngineError("a file was changed", status=503, code="version_unavailable")
    canary.start(ws, "v1", 1.0, force=True)
    with client_of(ws, engine) as client:
        assert [ask(client).headers["x-treering-version"] for _ in range(3)] == ["v2"] * 3
    assert engine.asked["v1"] == 1 and arms(ws)["canary"].errors == 3


def test_a_stream_that_breaks_off_says_so_and_counts(ws: Workspace) -> None:
    engine = Fake()
    engine.broken["v1"] = DEAD
    engine.begun.add("v1")
    canary.start(ws, "v1", 1.0, force=True)
    with client_of(ws, engine) as client:
        answer = ask(client, stream=True)
        assert answer.headers["x-treering-version"] == "v1" and "the process died" in answer.text
        assert ask(client).headers["x-treering-version"] == "v2"  # Nothing was sent yet.
    assert (arms(ws)["canary"].requests, arms(ws)["canary"].errors) == (2, 2)


def test_wrong_requests_are_no_figures(ws: Workspace) -> None:
    canary.start(ws, "v1", 1.0, force=True)
    with client_of(ws, Fake()) as client:
        assert ask(client, temperature=9).status_code == 400
        with cast(Any, client.app).state.server.limits.entered(8):
            assert ask(client).status_code == 429
    assert arms(ws) == {}


def test_a_damaged_file_puts_nothing_on_trial(ws: Workspace) -> None:
    canary.start(ws, "v1", 1.0, force=True)
    with client_of(ws, Fake()) as client:
        assert ask(client).headers["x-treering-version"] == "v1"
        (ws.root / canary.FILE).write_text("{")
        eventually(lambda: "canary.json is damaged" in client.get("/readyz").json()["problem"])
        assert ask(client).headers["x-treering-version"] == "v2"
        assert client.get("/readyz").status_code == 200
        canary.start(ws, "v1", 1.0, force=True)
        eventually(lambda: ask(client).headers["x-treering-version"] == "v1")
        assert client.get("/readyz").json()["problem"] == ""


# In shadow


def test_a_shadow_is_asked_compared_and_not_sent(ws: Workspace) -> None:
    engine = Fake()
    engine.answers["v1"] = "The  same "
    canary.start(ws, "v1", shadow=True)
    with client_of(ws, engine) as client:
        for expected in (1, 2):
            assert ask(client).headers["x-treering-version"] == "v2"
            eventually(lambda expected=expected: engine.asked["v1"] == expected)  # type: ignore[misc]
        engine.answers["v1"] = "another "
        ask(client)
        eventually(lambda: engine.asked["v1"] == 3)
        ask(client, temperature=1.0)  # Drawn: not compared.
        eventually(lambda: engine.asked["v1"] == 4)
    shadow = arms(ws)["shadow"]
    assert (shadow.requests, shadow.errors, shadow.dropped, shadow.compared) == (4, 0, 0, 3)
    assert shadow.agreement == pytest.approx(2 / 3)
    assert shadow.f1 == pytest.approx((1 + 1 + 2 * 1 / (2 + 3)) / 3)
    assert arms(ws)["control"].requests == 4


def test_a_shadow_that_fails_is_nobodys_trouble(ws: Workspace) -> None:
    engine = Fake()
    engine.broken["v1"] = DEAD
    canary.start(ws, "v1", shadow=True)
    with client_of(ws, engine) as client:
        assert ask(client, stream=True).status_code == 200
        eventually(lambda: engine.asked["v1"] == 1)
    assert (arms(ws)["shadow"].errors, arms(ws)["control"].errors) == (1, 0)


def test_a_shadow_makes_way(ws: Workspace) -> None:
    """It runs only while users leave half of the batch free (here two of four), and is cut off when they need it."""
    engine = Fake()
    canary.start(ws, "v1", shadow=True)
    with client_of(ws, engine) as client:
        engine.wait = asyncio.Event()  # From now on shadows take for ever.
        limits = cast(Any, client.app).state.server.limits
        ask(client)
        eventually(lambda: engine.asked["v1"] == 1)
        limits.inside = 2
        ask(client)  # Cuts the first off, and is not asked of the shadow itself.
        limits.inside = 0
        metric = 'treering_canary_requests_total{arm="shadow",outcome="dropped"} 2.0'
        eventually(lambda: metric in client.get("/metrics").text)
        assert engine.asked["v1"] == 1
        ask(client)
        eventually(lambda: engine.asked["v1"] == 2)
    shadow = arms(ws)["shadow"]  # The end of the server cut the last one off.
    assert (shadow.requests, shadow.dropped) == (0, 3)


# Figures


def line(arm: figures.Arm, by: str, requests: int, errors: int = 0, mode: canary.Mode = "canary", at: int = 0) -> Line:
    start = NOW + timedelta(minutes=at)
    made = Line(version="v3", mode=mode, arm=arm, by=by, start=start, end=start + timedelta(minutes=1))
    for number in range(requests):
        made.count(0.1 * (1 + number % 10), tokens=5, failed=number < errors)
    return made


def thumb(ws: Workspace, version: str, rating: Literal["up", "down"], when: datetime, count: int) -> None:
    with pytest.MonkeyPatch.context() as clock:
        clock.setattr(feedback, "timestamp", lambda: when.isoformat(timespec="seconds"))
        for _ in range(count):
            said = Feedback(messages=ASK, answer="x", rating=rating, version=version)
            feedback.keep(ws, said, None)


def test_figures_add_up(workspace: Callable[..., Workspace]) -> None:
    ws = workspace()
    for one in (line("canary", "v3", 50, 5), line("canary", "v3", 50, 5, at=1), line("control", "v2", 900, 9)):
        figures.append(ws, one)
    figures.append(ws, line("control", "v2", 7).model_copy(update={"version": "v9"}))
    thumb(ws, "v3", "down", NOW + timedelta(minutes=1), 6)
    thumb(ws, "v2", "up", NOW + timedelta(minutes=1), 20)
    thumb(ws, "v2", "down", NOW - timedelta(days=1), 9)  # Before the trial.
    thumb(ws, "v3", "up", NOW + timedelta(hours=5), 9)  # Long after.
    found = figures.figures(ws, "v3")
    tried, control = found.arms
    assert (tried.arm, tried.requests, tried.errors, tried.completion_tokens) == ("canary", 100, 10, 500)
    assert (tried.up, tried.down, control.up, control.down) == (0, 6, 20, 0)
    assert tried.seconds_mean == pytest.approx(0.55)
    assert tried.seconds_p95 == pytest.approx(1.0, rel=0.06)
    errors, thumbs = found.comparisons
    assert (errors.candidate, errors.control) == (0.1, 0.01) and errors.p < 0.001
    assert errors.words.startswith("errors: v3 10.0% of 100, current 1.0% of 900: v3 is worse (p = ")
    assert thumbs.what == "thumbs down" and "v3 is worse" in thumbs.words
    assert (ws.root / figures.FILE).read_bytes().count(b"\n") == 4


def test_what_users_met_as_worse_is_promoted_by_force_only(ws: Workspace) -> None:
    assert registry.current(ws).name == "v2" and registry.get(ws, "v1").promote  # type: ignore[union-attr]
    for one in (line("canary", "v2", 100, 1), line("control", "v2", 100, 20)):
        figures.append(ws, one.model_copy(update={"version": "v1"}))
    ws.promote("v1")  # It failed less often than current.
    ws.promote("v2")
    figures.append(ws, line("canary", "v1", 100, 90).model_copy(update={"version": "v1"}))
    with pytest.raises(UsageError, match=r"v1 did worse when it was on trial: errors: v1 45\.5% of 200, .* --force"):
        ws.promote("v1")
    ws.promote("v1", force=True)
    assert [event["forced"] for event in registry.history(ws)][-3:] == [False, False, True]


def test_few_requests_show_nothing(workspace: Callable[..., Workspace]) -> None:
    ws = workspace()
    assert figures.figures(ws, "v3") == figures.Figures()
    for one in (line("canary", "v3", 5, 1), line("control", "v2", 50)):
        figures.append(ws, one)
    [errors] = figures.figures(ws, "v3").comparisons
    assert "no difference is shown" in errors.words


def test_shadow_and_canary_are_compared_apart(workspace: Callable[..., Workspace]) -> None:
    ws = workspace()
    figures.append(ws, line("shadow", "v3", 10, 10, mode="shadow"))
    figures.append(ws, line("control", "v2", 10, mode="shadow"))
    figures.append(ws, line("canary", "v3", 10, at=5))
    figures.append(ws, line("control", "v2", 10, at=5))
    found = figures.figures(ws, "v3")
    assert [(arm.mode, arm.arm) for arm in found.arms] == [
        ("canary", "canary"),
        ("canary", "control"),
        ("shadow", "control"),
        ("shadow", "shadow"),
    ]
    assert [(c.mode, c.candidate) for c in found.comparisons] == [("canary", 0.0), ("shadow", 1.0)]


def test_damaged_figures_are_told(workspace: Callable[..., Workspace]) -> None:
    ws = workspace()
    figures.append(ws, line("canary", "v3", 1))
    with (ws.root / figures.FILE).open("a") as log:
        log.write("{}\n")
    with pytest.raises(TreeringError, match="line 2 is damaged"):
        figures.figures(ws, "v3")


def test_what_cannot_be_written_waits(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    canary.start(ws, "v1", 1.0, force=True)
    with client_of(ws, Fake()) as client:
        ask(client)
        with monkeypatch.context() as full:
            full.setattr(figures, "append_line", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
            assert client.portal is not None
            client.portal.call(trial_of(client).write)
        ask(client)
    assert arms(ws)["canary"].requests == 2


def test_a_line_a_minute(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treering.serve.trial.SECONDS_A_LINE", 0.0)
    canary.start(ws, "v1", 1.0, force=True)
    with client_of(ws, Fake()) as client:
        for number in (1, 2):
            ask(client)
            eventually(lambda number=number: len(figures.read(ws, "v1")) == number)  # type: ignore[misc]
    assert len(figures.read(ws, "v1")) == 2


# A real server


@pytest.fixture(scope="module")
def served(trained: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("canary")
    ws = Workspace(shutil.copytree(trained.root, folder / "ws", symlinks=True))
    running = Served(ws, folder / "serve.log")
    running.eventually(lambda: running.ask(max_tokens=1).system_fingerprint == "v2")
    yield running
    running.process.kill()
    running.process.wait()


def test_real_users_keep_their_version(served: Served) -> None:
    canary.start(served.ws, "v1", 0.5, force=True)
    users = ["ann", "bob", "cleo", "dan", "eve"]
    wanted = {user: "v1" if place("v1", user) < 0.5 else "v2" for user in users}
    assert set(wanted.values()) == {"v1", "v2"}
    first = next(user for user in users if wanted[user] == "v1")
    served.eventually(lambda: served.ask(user=first, max_tokens=1).system_fingerprint == "v1")
    for user in users:
        raw = served.client.chat.completions.with_raw_response.create(
            model="current", messages=ASK, user=user, max_tokens=3
        )
        assert raw.headers["x-treering-version"] == raw.parse().system_fingerprint == wanted[user]
        events = list(served.ask(user=user, stream=True))
        assert {event.system_fingerprint for event in events} == {wanted[user]}
        assert "".join(event.choices[0].delta.content or "" for event in events) == (
            served.ask(wanted[user]).choices[0].message.content
        )
    answer = served.ask(user=first)
    said = {"messages": ASK, "answer": "x", "rating": "down", "response_id": answer.id}
    served.client.post("/feedback", body=said, cast_to=dict[str, str])
    canary.stop(served.ws)
    served.eventually(lambda: "control" in arms(served.ws))
    counted = arms(served.ws)
    assert counted["canary"].requests + counted["control"].requests >= 10
    assert counted["canary"].errors == counted["control"].errors == 0 and counted["canary"].down == 1


def test_a_real_shadow_is_compared(served: Served) -> None:
    canary.start(served.ws, "v1", shadow=True)
    served.eventually(lambda: "v1 is on trial (shadow)" in served.log.read_text())
    same = 0
    for number in range(3):
        asked: Any = [{"role": "user", "content": f"a item {number}: sort {'abc'[number]}"}]
        answer = served.ask(messages=asked)
        assert answer.system_fingerprint == "v2"
        wanted = f'arm="shadow",outcome="answered"}} {number + 1}.0'
        served.eventually(lambda wanted=wanted: wanted in served.get("/metrics"))  # type: ignore[misc]
        theirs = served.ask("v1", messages=asked)
        same += figures_agree(answer, theirs)
    streams = [served.ask(messages=LONG, max_tokens=1500, stream=True, model="base") for _ in range(2)]
    for stream in streams:
        next(stream)
    served.ask(max_tokens=2)
    served.eventually(lambda: 'arm="shadow",outcome="dropped"} 1.0' in served.get("/metrics"))
    for stream in streams:
        stream.close()
    canary.stop(served.ws)
    served.eventually(lambda: "shadow" in arms(served.ws))
    shadow = arms(served.ws)["shadow"]
    assert (shadow.compared, shadow.dropped) == (3, 1)
    assert shadow.agreement == pytest.approx(same / 3)


def figures_agree(one: Any, other: Any) -> bool:
    from treering.scoring import exact_match

    return exact_match(one.choices[0].message.content, other.choices[0].message.content) == 1


def test_a_version_that_is_gone_is_told(served: Served) -> None:
    gone = canary.Canary(version="v9", share=1.0, since=NOW)
    (served.ws.root / canary.FILE).write_text(gone.model_dump_json())
    served.eventually(lambda: "v9 is on trial and cannot answer" in json.loads(served.get("/readyz"))["problem"])
    assert served.ask(max_tokens=2).system_fingerprint == "v2"
    canary.stop(served.ws)
    served.eventually(lambda: "canary" in arms(served.ws, "v9"))
    assert (arms(served.ws, "v9")["canary"].requests, arms(served.ws, "v9")["canary"].errors) == (1, 1)


def test_it_is_run_over_the_api_and_ends_with_a_promotion(served: Served) -> None:
    _, secret = keys.create(served.ws, "ops", "admin")

    def admin(path: str, body: dict[str, Any] | None = None) -> Any:
        head = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(served.url + path, data, head), timeout=30) as answer:
            return json.loads(answer.read())

    mine = served.client.with_options(api_key=secret)
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            served.get("/admin/canary")
        for wrong in ({}, {"version": "v1", "off": True}, {"version": "v2"}, {"version": "v1", "share": 2}):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                admin("/admin/canary", wrong)
        begun = admin("/admin/canary", {"version": "v1", "share": 1, "force": True})
        assert (begun["version"], begun["share"], begun["ended"]) == ("v1", 1, None)
        before = next((arm["requests"] for arm in begun["arms"] if arm["arm"] == "canary"), 0)
        answer = mine.chat.completions.create(model="current", messages=ASK, max_tokens=2)
        assert answer.system_fingerprint == "v1"
        counted = next(arm for arm in admin("/admin/canary")["arms"] if arm["arm"] == "canary")
        assert counted["requests"] == before + 1
        assert admin("/admin/canary", {"off": True})["reason"] == "turned off"
        answer = mine.chat.completions.create(model="current", messages=ASK, max_tokens=2)
        assert answer.system_fingerprint == "v2"
        admin("/admin/canary", {"version": "v1", "shadow": True})
        admin("/admin/promote", {"version": "v1", "force": True})
        assert admin("/admin/canary")["reason"] == "v1 became current"
    finally:
        (served.ws.root / keys.FILE).unlink()
    served.ws.promote("v2", force=True)
    served.eventually(lambda: served.ask(max_tokens=1).system_fingerprint == "v2")


def test_a_server_that_ends_writes_what_it_counted(served: Served) -> None:
    canary.start(served.ws, "v1", 1.0, force=True)
    served.eventually(lambda: served.ask(max_tokens=1).system_fingerprint == "v1")
    before = arms(served.ws)["canary"].requests
    assert served.stop() == 0
    assert arms(served.ws)["canary"].requests > before
    assert "Traceback" not in served.log.read_text()
