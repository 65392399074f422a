"""The parts of the server on their own: text, sampling, keys, limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treering import Workspace
from treering.errors import TreeringError, UsageError
from treering.model import load_tokenizer
from treering.serve import keys
from treering.serve.answered import Answered
from treering.serve.engine import EngineError, Job
from treering.serve.errors import ApiError
from treering.serve.grammars import KEPT, Grammars
from treering.serve.limits import Limits, TooManyError
from treering.serve.sampling import Sampler
from treering.serve.text import Writer
from treering.serve.threads import worth


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from treering.testing import tiny_model

    return load_tokenizer(tiny_model(tmp_path_factory.mktemp("tokenizer")))


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_text_comes_whole_and_ends_before_a_stop_string(tokenizer: Any, text: str, stop: list[str]) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    writer = Writer(tokenizer.backend_tokenizer, stop)
    pieces: list[str] = []
    for token in tokens:
        pieces.append(writer.push(token))
        if writer.stopped:
            break
    pieces.append(writer.rest())
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    written = "".join(pieces)
    assert whole.startswith(written)
    # The stop string that is complete first ends the text, before where it begins.
    ends = [whole.index(one) + len(one) for one in stop if one in whole]
    assert writer.stopped == bool(ends)
    if ends:
        assert any(whole[len(written) :].startswith(one) for one in stop)
        assert not any(one in written for one in stop)
    else:
        assert written == whole
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) or "\N{REPLACEMENT CHARACTER}" in text


def job(**settings: Any) -> Job:
    return Job(id="j", version="base", prompt="x", **settings)


def test_greedy_takes_the_likeliest_and_penalties_move_it(tokenizer: Any) -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    assert Sampler(job(), 0, tokenizer, None).choose(logits)[0] == 1
    assert Sampler(job(logit_bias={3: 50.0}), 0, tokenizer, None).choose(logits)[0] == 3
    penalised = Sampler(job(frequency_penalty=0.75, presence_penalty=0.5), 0, tokenizer, None)
    assert [penalised.choose(logits)[0] for _ in range(3)] == [1, 2, 1]
    _, token = Sampler(job(logprobs=2, logit_bias={0: 50.0}), 0, tokenizer, None).choose(logits)
    assert token is not None
    expected = logits.log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[0]))  # The model's own, whatever the bias.
    assert [value for _, value in token.top] == pytest.approx([float(expected[1]), float(expected[2])])


def test_biases_are_few(tokenizer: Any) -> None:
    Sampler(job(logit_bias=dict.fromkeys(range(len(tokenizer)), 1.0)), 0, tokenizer, None)
    with pytest.raises(EngineError, match="301 tokens; name 300 at most"):
        Sampler(job(logit_bias=dict.fromkeys(range(301), 1.0)), 0, tokenizer, None)


def test_biases_are_of_tokens_that_there_are(tokenizer: Any) -> None:
    for id in (-1, len(tokenizer)):
        with pytest.raises(EngineError, match=f"the token {id}; this model has those from 0 to {len(tokenizer) - 1}"):
            Sampler(job(logit_bias={id: 1.0}), 0, tokenizer, None)


def test_the_coldest_temperatures_take_the_likeliest(tokenizer: Any) -> None:
    logits = torch.tensor([0.0, 2.0, 1.99, -1.0])
    for temperature in (1e-40, 1e-6, 1e-4):
        assert Sampler(job(), temperature, tokenizer, None).choose(logits * 1000)[0] == 1


def test_without_scores_there_is_nothing_to_choose(tokenizer: Any) -> None:
    for score in (float("nan"), float("-inf"), float("inf")):
        with pytest.raises(EngineError, match="base gives no token a score"):
            Sampler(job(), 1, tokenizer, None).choose(torch.full((4,), score))


def test_a_grammar_needs_no_compiler(tokenizer: Any) -> None:
    grammars = Grammars(tokenizer, len(tokenizer))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):  # Each use is one from the beginning.
            matcher = grammars.of({"enum": ["ab"]}).result().deep_copy()
            sampler, written = Sampler(job(), 0, tokenizer, matcher), ""
            while not sampler.ended:
                written += tokenizer.decode([sampler.choose(torch.zeros(len(tokenizer) + 5))[0]])
            assert written == '"ab"'


def test_a_grammar_is_built_once(tokenizer: Any) -> None:
    grammars = Grammars(tokenizer, len(tokenizer))
    first = grammars.of({"enum": ["a"]})
    assert grammars.of({"enum": ["a"]}) is first
    for number in range(KEPT):
        grammars.of({"enum": [number]}).result()
    assert grammars.of({"enum": ["a"]}) is not first


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"const": "\ud800"}, "cannot be followed"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "nothing fits it"),
        ({"enum": ["x" * 60_000]}, "60014 characters; 50000 is the most"),
        ({"type": "integer", "multipleOf": 999983}, "multipleOf asks for 999983; 10000 is the most"),
        ({"type": "number", "multipleOf": 0.00012345}, "multipleOf asks for"),
        ({"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}, "asks for 988027"),
        ({"multipleOf": 997, "anyOf": [{"type": "integer", "multipleOf": 991}]}, "asks for 988027"),
        ({"oneOf": [{"type": "integer", "multipleOf": 997 + n} for n in range(4)]}, "asks for 994010994"),
    ],
)
def test_schemas_that_cannot_be_followed(tokenizer: Any, schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(EngineError, match=f"cannot be followed.*{reason}" if "cannot" not in reason else reason):
        Grammars(tokenizer, len(tokenizer)).of(schema).result()


def test_schemas_that_can_be_followed(tokenizer: Any) -> None:
    grammars = Grammars(tokenizer, len(tokenizer))
    grammars.of({"oneOf": [{"type": "object"}, {"type": "object"}]}).result()
    prices = {name: {"type": "number", "multipleOf": 0.01} for name in "abcdef"}
    grammars.of({"type": "object", "properties": prices}).result()
    grammars.of({"type": "integer", "multipleOf": 9973}).result()


def test_drawn_tokens_follow_the_distribution(tokenizer: Any) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def shares(**settings: Any) -> list[float]:
        temperature = settings.pop("temperature", 1.0)
        sampler = Sampler(job(seed=7, **settings), temperature, tokenizer, None)
        drawn = torch.tensor([sampler.choose(logits)[0] for _ in range(4000)])
        return [float(share) for share in drawn.bincount(minlength=4) / 4000]

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.5) == shares(top_p=5e-324) == [1, 0, 0, 0]
    squared = [value / (0.25 + 0.09 + 0.0225 + 0.0025) for value in (0.25, 0.09, 0.0225, 0.0025)]
    assert shares(temperature=0.5) == pytest.approx(squared, abs=0.03)


def test_limits_count_answers_and_minutes() -> None:
    now = 0.0
    limits = Limits(3, clock=lambda: now)
    with limits.entered(2):
        with pytest.raises(TooManyError, match="2 answers are under way"), limits.entered(2):
            pass
        with limits.entered(1):
            assert limits.inside == 3
    assert limits.inside == 0
    for _ in range(2):
        limits.ask("a", 2)
    with pytest.raises(TooManyError) as found:
        limits.ask("a", 2)
    assert found.value.retry_after == 61
    limits.ask("b", 2)
    now = 60.0
    limits.ask("a", 2)


def test_answers_are_remembered_for_an_hour_and_not_without_end() -> None:
    now = 0.0
    answered = Answered(most=2, clock=lambda: now)
    for id, version in (("a", "v1"), ("b", "v1"), ("c", "v2")):
        answered.note(id, version)
    with pytest.raises(ApiError, match="no answer 'a' is known"), answered.rating("a"):
        pass
    with answered.rating("c") as version:
        assert version == "v2"
    now = 3601.0
    with pytest.raises(ApiError, match="more than an hour ago"), answered.rating("b"):
        pass
    answered.note("d", "v2")
    assert list(answered._known) == ["d"]


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace.create(tmp_path / "ws")


def test_keys_are_kept_as_hashes(ws: Workspace) -> None:
    first, secret = keys.create(ws, "shop")
    other, _ = keys.create(ws, "ops", "admin", 60)
    path = ws.root / keys.FILE
    assert secret not in path.read_text() and path.stat().st_mode & 0o077 == 0
    store = keys.Keys(ws.root)
    assert store.find(secret) == first and store.find(secret + "x") is None
    assert keys.revoke(ws, first.id) == first
    assert store.find(secret) is None and store.all() == [other]
    with pytest.raises(UsageError, match=other.id):
        keys.revoke(ws, first.id)
    with pytest.raises(UsageError, match="api or admin"):
        keys.create(ws, "x", "root")


def test_damaged_keys_let_nobody_pass(ws: Workspace) -> None:
    keys.create(ws, "shop")
    (ws.root / keys.FILE).write_text("[{")
    with pytest.raises(TreeringError, match="restore it from a backup"):
        keys.Keys(ws.root).all()


def test_keys_on_the_command_line(ws: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    from treering.cli import run

    assert run(["keys", "create", "-w", str(ws.root), "--name", "shop", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["key"].startswith("tr-") and made["name"] == "shop" and made["scope"] == "api"
    assert run(["keys", "list", "-w", str(ws.root), "--json"]) == 0
    listed = capsys.readouterr().out
    assert made["key"] not in listed and json.loads(listed)["keys"][0]["id"] == made["id"]
    assert run(["keys", "revoke", made["id"], "-w", str(ws.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"revoked": made["id"]}
    assert run(["keys", "revoke", made["id"], "-w", str(ws.root)]) == 3


def test_a_pass_takes_as_many_threads_as_it_is_worth() -> None:
    small, large = 135_000_000, 7_000_000_000
    assert [worth(small, tokens, 16) for tokens in (1, 8, 32, 128)] == [1, 1, 3, 14]
    assert [worth(large, tokens, 16) for tokens in (1, 128)] == [16, 16]
    assert worth(large, 128, 1) == 1
