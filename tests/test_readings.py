"""Memory that runs out while rows are read: smaller parts, the same scores, and the same parts again if killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import QUICK
from tests.test_early import Spared, looks
from tests.test_rates import no_bar, range_test
from tests.test_recovery import NO_MEMORY, Short
from tests.training import KilledError, Run, chat, same_bits, settings
from treering import Workspace, model, optimizers, registry, tree
from treering.data.example import Example
from treering.errors import TreeringError
from treering.evaluate import evaluate
from treering.greedy import generate
from treering.passes import in_parts, losses
from treering.readings import Reading, Readings
from treering.results import Result
from treering.testing import toy_rows
from treering.train import teach


def rows(count: int) -> list[list[int]]:
    return [[number] * 9 for number in range(count)]


def always(_: Sequence[int]) -> bool:
    return True


def read(model_folder: Path, fits: Callable[[Sequence[int]], bool], reading: Reading) -> list[Any]:
    """Reads 32 rows in parts of at most 8; returns how many each was read with."""
    run = Run(model_folder, settings(model_folder, eval={"batch_size": 8}))

    def work(part: Sequence[int]) -> list[tuple[int, int]]:
        if not fits(part):
            raise RuntimeError(NO_MEMORY)
        return [(at, len(part)) for at in part]

    found = in_parts(run.model, rows(32), work, run.config, no_bar, reading=reading)
    assert [at for at, _ in found] == list(range(32))
    return [together for _, together in found]


@pytest.mark.parametrize("count", [1, 2])
def test_from_there_on_in_halves(
    tmp_path: Path,
    model_folder: Path,
    threads: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    count: int,
) -> None:
    """Each row once and in its place; told once for each time, kept with its reason."""
    threads(count)
    readings = Readings(tmp_path / "new")
    assert (
        read(model_folder, lambda part: len(part) <= 2 or max(part) < 16, readings.of("reading")) == [8] * 16 + [2] * 16
    )
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("; from there on ")[2] for line in said] == [
        f"at most {rows} rows are read at once, which changes nothing but rounding" for rows in (4, 2)
    ]
    assert all(line.startswith("treering: out of memory when reading ([enforce fail at alloc_cpu") for line in said)
    kept = json.loads((tmp_path / "new" / "readings.json").read_text())
    assert [(halved["part"], halved["rows"]) for halved in kept] == [(2, 4), (2, 2)]
    assert Readings(tmp_path / "new").choices == readings.choices
    assert readings.choices["rows at once when reading"]["value"] == 2
    # The same again with memory enough, as in a run that was killed; not in a reading of another name.
    assert read(model_folder, always, Readings(tmp_path / "new").of("reading")) == [8] * 16 + [2] * 16
    assert read(model_folder, always, readings.of("measuring")) == [8] * 32
    assert capsys.readouterr().err == ""


def test_later_readings_begin_with_what_is_known(model_folder: Path) -> None:
    readings = Readings(None)
    assert read(model_folder, lambda part: len(part) <= 4, readings.of("looking", 2)) == [4] * 32
    found = {number: set(read(model_folder, always, readings.of("looking", number))) for number in (1, 2, 3)}
    assert found == {1: {8}, 2: {4}, 3: {4}}


def test_no_memory_for_one_row(tmp_path: Path, model_folder: Path) -> None:
    readings = Readings(tmp_path)
    with pytest.raises(
        TreeringError, match=r"when reading \(.* one row at a time\. Lower cutoff_len .* a smaller model"
    ):
        read(model_folder, lambda part: 9 not in part, readings.of("reading"))
    assert [halved.rows for halved in readings.halved] == [4, 2, 1]


def test_a_row_alone_beside_parts_that_can_be_halved(model_folder: Path, threads: Callable[[int], None]) -> None:
    """Of two that are read at once it may be the other that takes the memory."""
    readings = Readings(None)
    assert readings.of("reading").halve([[0], [1, 2, 3]], 0, 2, "short") == [[0], [1, 2], [3]]
    with pytest.raises(TreeringError, match="one row at a time"):
        readings.of("reading").halve([[0], [1, 2, 3]], 0, 1, "short")


def test_other_errors_are_not_survived(tmp_path: Path, model_folder: Path) -> None:
    def bug(part: Sequence[int]) -> bool:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        read(model_folder, bug, Readings(tmp_path).of("reading"))
    assert not (tmp_path / "readings.json").exists()


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Passes over more tokens than that find no memory; returns the tokens of those that did."""
    run = model.run

    def limit(tokens: int) -> list[int]:
        seen: list[int] = []

        def forward(model: Any, inputs: dict[str, Tensor], *others: Any) -> Tensor:
            if inputs["input_ids"].numel() > tokens:
                raise RuntimeError(NO_MEMORY)
            seen.append(inputs["input_ids"].numel())
            return run(model, inputs, *others)

        monkeypatch.setattr(tree, "run", forward)
        return seen

    return limit


def asked() -> list[Example]:
    return [chat(("user", f"{number} {'x' * (number % 7)}"), ("assistant", f"{number}")) for number in range(24)]


def test_all_that_is_read(model_folder: Path, little_memory: Callable[[int], list[int]]) -> None:
    """Scores, losses, logits and answers are those of whole parts."""
    config = settings(model_folder, eval={"batch_size": 24, "max_new_tokens": 4})
    run = Run(model_folder, config, asked())
    known = list(run.rows.values())

    def all_of_it() -> tuple[list[Result], list[float], dict[str, Any], list[str]]:
        scores = evaluate(
            run.model, run.tokenizer, [(row, "task") for row in asked()], {"task": "exact_match"}, config, quiet=True
        )
        logits = teach(run.model, known, config, top_k=4, pad_id=run.pad_id, quiet=True)
        answers = generate(run.model, run.tokenizer, [row.prompt for row in asked()], [4] * 24, config)
        return scores, losses(run.model, known, config, run.pad_id), logits, answers

    seen = little_memory(10**9)
    whole = all_of_it()
    most = max(seen) // 3
    seen = little_memory(most)
    halved = all_of_it()
    assert max(seen) <= most
    assert [(r.id, r.prediction, r.score) for r in halved[0]] == [(r.id, r.prediction, r.score) for r in whole[0]]
    assert [r.loss for r in halved[0]] == pytest.approx([r.loss for r in whole[0]], rel=1e-5)
    assert halved[1] == pytest.approx(whole[1], rel=1e-5)
    assert halved[2].keys() == whole[2].keys() and halved[3] == whole[3]
    for id, teacher in whole[2].items():
        assert torch.equal(halved[2][id].ids, teacher.ids)
        torch.testing.assert_close(halved[2][id].logits, teacher.logits, rtol=1e-3, atol=1e-3)


def test_rows_kept_aside(
    tmp_path: Path, model_folder: Path, little_memory: Callable[[int], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """From the look on that found no memory; killed and resumed with memory enough, the same losses to the bit."""
    values = {"eval": {"batch_size": 4}, "save_steps": 50, "max_steps": 12}
    seen = little_memory(10**9)
    plain = looks(Spared(model_folder, **values).train())
    seen = little_memory(max(seen) - 1)
    whole = Spared(model_folder, **values)
    log = whole.train(checkpoints=tmp_path / "whole")
    assert looks(log) == pytest.approx(plain, rel=1e-5)
    halved = Readings(tmp_path / "whole").halved
    assert [(one.what, one.number, one.rows) for one in halved] == [("measuring the rows kept aside", 3, 2)]
    assert capsys.readouterr().err.count("at most 2 rows are read at once") == 1
    little_memory(10**9)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "readings.json").write_text((tmp_path / "whole" / "readings.json").read_text())
    seen = little_memory(10**9)
    last = Spared(model_folder, **values)
    assert looks(last.train(checkpoints=tmp_path / "killed")) == looks(log)
    assert same_bits(last.weights(), whole.weights()) and capsys.readouterr().err == ""


def test_the_range_test(
    tmp_path: Path,
    model_folder: Path,
    little_memory: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its trainings are undone and taken in smaller pieces, its rows read so; killed, it finds the same losses."""

    def choice(folder: Path | None) -> Any:
        run = Run(model_folder, settings(model_folder, per_device_train_batch_size=8, eval={"batch_size": 8}))
        start = run.weights()
        test = range_test(run, folder=folder)
        found = test.choose(no_bar)
        assert same_bits(run.weights(), start)
        return found

    seen = little_memory(10**9)
    plain = choice(None)
    make, made = optimizers.optimizer, list[Short]()

    def short(*args: Any) -> Short:
        made.append(Short(make(*args), {3} if len(made) == 1 else set()))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "optimizer", short)
        little_memory(max(seen) - 1)
        whole = choice(tmp_path)
    said = capsys.readouterr().err
    assert said.count("out of memory at step 3 (while the weights were changed") == 1
    assert said.count("out of memory when measuring") == len(Readings(tmp_path).halved) > 0
    assert whole.value == plain.value and len(made) == len(whole.tried) + 1
    for one, other in zip(whole.tried, plain.tried, strict=True):
        assert one.losses.new == pytest.approx(other.losses.new, rel=1e-3)
    assert "; memory ran out, and rows were trained in 2 pieces a batch and read" in whole.reason
    assert whole.reason.endswith("at once")
    little_memory(10**9)
    again = choice(tmp_path)
    assert (again.before, again.tried, again.reason) == (whole.before, whole.tried, whole.reason)
    assert capsys.readouterr().err == ""


def test_an_update_that_is_killed_while_it_measures(
    workspace: Callable[..., Workspace],
    little_memory: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The version tells what was halved and why, and has the same results as if it had not been killed."""
    values = {**QUICK, "protect": ["replay", "distill"], "eval": {"batch_size": 8, "max_new_tokens": 4}}

    def waiting(name: str) -> Workspace:
        ws = workspace(name, **values)
        ws.ingest(toy_rows("pens", 60), task="pens")
        return ws

    seen = little_memory(10**9)
    waiting("plain").update()
    little_memory(max(seen) - 1)
    wanted = waiting("whole").update()
    assert wanted is not None
    choices = {key: said for key, said in wanted.manifest["choices"].items() if key.startswith("rows at once when")}
    assert "rows at once when taking logits to remember" in choices
    assert all(said["value"] == 4 and "out of memory when" in said["reason"] for said in choices.values())
    ws, note = waiting("killed"), Readings.note

    def dies(self: Readings, found: Any) -> None:
        note(self, found)
        raise KilledError

    for _ in choices:
        with monkeypatch.context() as patch:
            patch.setattr(Readings, "note", dies)
            with pytest.raises(KilledError):
                ws.update()
    found = ws.update()
    assert found is not None
    assert found.manifest["choices"] == wanted.manifest["choices"]
    for name in ("results.parquet", "adapter_model.safetensors", "memory.safetensors"):
        assert (found.folder / name).read_bytes() == (wanted.folder / name).read_bytes(), name


def test_what_finds_no_memory_elsewhere(workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be halved, the update says what to do, and keeps what it has."""
    ws = workspace(**QUICK)
    ws.ingest(toy_rows("pens", 20), task="pens")

    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr("treering.candidate.save_weights", short)
        with pytest.raises(TreeringError, match=r"out of memory \(CUDA out of memory\.\)\. Set optim: adamw_8bit"):
            ws.update()
    assert list((ws.root / "versions").glob(".staging-*/checkpoints/step-2"))
    assert ws.update() is not None and registry.current(ws) is not None
