"""General text in every epoch: which tokens are learned, how many rows there are, and that no task has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training import settings
from treering import Workspace, forecast, general
from treering.candidate import Candidate
from treering.data.shapes import convert
from treering.errors import ConfigError
from treering.memory import Memory
from treering.methods import Methods
from treering.model import encode, load_tokenizer
from treering.schedule import plan_steps
from treering.testing import toy_rows

TEXTS = [f"The {n}th lobster is a species of the sea." for n in range(30)]
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}


def written(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(folder: Path, root: Path, wanted: str, **values: Any) -> Any:
    config = settings(folder, memory={"general": "general.jsonl"}, **values)
    return general.read(config, root, load_tokenizer(folder), wanted)


def test_all_tokens_of_a_text_are_learned_and_of_chat_the_answers(model_folder: Path, tmp_path: Path) -> None:
    label = {"text": "a question", "label": "an answer"}
    wanted = written(tmp_path / "general.jsonl", [{"text": TEXTS[0]}, CHAT, {"text": TEXTS[0], "source": 3}, label])
    text, chat, labelled = read(model_folder, tmp_path, wanted).values()
    tokenizer = load_tokenizer(model_folder)
    assert text.ids == tokenizer(TEXTS[0])["input_ids"]
    assert text.answers == list(range(1, len(text.ids)))
    for row, record in ((chat, CHAT), (labelled, label)):
        example = convert(record)
        assert (row.ids, row.answers) == (encode(tokenizer, example).ids, encode(tokenizer, example).answers)
        assert row.id == f"general:{example.id}"
    cut = read(model_folder, tmp_path, wanted, cutoff_len=9)
    assert [(len(row.ids), row.answers) for row in cut.values()] == [(9, list(range(1, 9)))]


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([], "holds no rows|holds no text"),
        ([{"text": "x"}], "holds no text: add some"),  # One token predicts nothing.
        ([{"text": TEXTS[0]}, {"odd": 1}], "the keys found are 'odd'"),
        ([{"text": TEXTS[0]}, 7], "it must be an object"),
    ],
)
def test_what_is_no_text_is_refused(model_folder: Path, tmp_path: Path, records: list[Any], told: str) -> None:
    wanted = written(tmp_path / "general.jsonl", records)
    with pytest.raises(ConfigError, match=f"memory.general is general.jsonl, but .*({told})"):
        read(model_folder, tmp_path, wanted)


def test_another_file_than_was_planned_is_refused(model_folder: Path, tmp_path: Path) -> None:
    wanted = written(tmp_path / "general.jsonl", [{"text": TEXTS[0]}])
    written(tmp_path / "general.jsonl", [{"text": TEXTS[1]}])
    with pytest.raises(ConfigError, match="was changed while the update began"):
        read(model_folder, tmp_path, wanted)


@pytest.mark.parametrize(("share", "each"), [(0.1, 2), (0.5, 20), (0.8, 80)])
def test_each_epoch_has_its_share(share: float, each: int) -> None:
    config = settings(Path("none"), num_train_epochs=3.0, memory={"general_share": share})
    new, texts = [f"new {n}" for n in range(20)], [f"general:{n}" for n in range(30)]
    lengths = dict.fromkeys([*new, *texts], 3)
    steps = plan_steps(new, Memory(), Methods(config), lengths, config, texts)
    found = [id for step in steps for batch in step for id in batch if id.startswith("general:")]
    assert len(found) == 3 * each
    assert each < 30 or set(found) == set(texts)
    assert steps == plan_steps(new, Memory(), Methods(config), lengths, config, texts)


@pytest.mark.usefixtures("no_children")
def test_a_version_says_which_text_and_learns_it_as_no_ones(
    workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = workspace(
        learning_rate=1e-2,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        memory={"general": "general.jsonl", "general_share": 0.25},
        gate={"floor": 1.0},
    )
    ws.ingest(toy_rows("pens", 20), task="pens")
    before = ws.versions.stat().st_mtime_ns
    for run in (ws.update, lambda: forecast.forecast(ws, quiet=True)):
        with pytest.raises(ConfigError, match=r"memory.general is general.jsonl, but .* is no file: name one, or drop"):
            run()
    assert ws.versions.stat().st_mtime_ns == before
    wanted = written(ws.root / "general.jsonl", [{"text": text} for text in TEXTS[:20]])
    planned = forecast.forecast(ws, quiet=True).estimate
    seen: list[Candidate] = []
    learn = Candidate.learn

    def noted(self: Candidate, *given: Any) -> Any:
        seen.append(self)
        return learn(self, *given)

    monkeypatch.setattr(Candidate, "learn", noted)
    version = ws.update()
    assert version is not None and planned is not None
    manifest = version.manifest
    assert manifest["general"] == {"sha256": wanted, "rows": 20}
    # 18 new rows and 6 of text in each of two epochs.
    assert manifest["cost"]["rows_trained"] == planned.rows_trained == 48
    assert manifest["cost"]["steps"] == planned.steps == 6
    assert sum(id.startswith("general:") for step in seen[0].steps for batch in step for id in batch) == 12
    assert len(version.rows) == 18 and manifest["memory"] == {"pens": 8}
    assert not any(id.startswith("general:") for id in [*Memory.load(version.folder).rows, *version.rows])
    assert ws.catalog.counts()["train"] == 18
    assert seen[0].plan.digest != type(seen[0].plan)(**{**vars(seen[0].plan), "general": "another"}).digest
