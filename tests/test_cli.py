"""The command line: what docs/cli.md says of each command is what it does."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.bench.test_bench_quality import InProcess
from treering import Workspace, figures, registry
from treering.automate.children import Answer
from treering.calibrate import Estimate
from treering.cli import app, run
from treering.methods import PROTECT
from treering.sections import MemoryConfig
from treering.testing import toy_rows

ROOT = Path(__file__).parents[1]


class Section:
    """What docs/cli.md says of one command."""

    def __init__(self, text: str) -> None:
        self.text = text
        tables = dict(re.findall(r"^\| (\w[\w ]*) \|.*\n\| --- .*\n((?:\|.*\n)+)", text, re.M))
        self.options = set(re.findall(r"^\| `(--[\w-]+)`", tables.get("option", ""), re.M))
        self.keys: set[str] = set()
        self.sometimes: set[str] = set()
        for key, meaning in re.findall(r"^\| `(.+?)` \| (.*) \|$", tables.get("key", ""), re.M):
            (self.sometimes if meaning.startswith("*sometimes*") else self.keys).add(key.replace("[]", ".[]"))

    def check(self, value: Any, path: str = "") -> None:
        """Assert that the JSON value has the documented keys and no others, as deep as they are documented."""
        known = {key[len(path) :].split(".")[0] for key in self.keys | self.sometimes if key.startswith(path)} - {""}
        if not known:
            return
        if known <= {"[]", "*"}:
            for element in value if "[]" in known else value.values():
                self.check(element, f"{path}{min(known)}.")
            return
        must = {key[len(path) :].split(".")[0] for key in self.keys if key.startswith(path)}
        must -= {key[len(path) :] for key in self.sometimes}
        found = {key for key in value if not re.fullmatch(r"v\d+", key)}
        assert must - {""} <= found <= known, path
        for key in known & set(value):
            self.check(value[key], f"{path}{key}.")


def sections() -> dict[str, Section]:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    parts = re.split(r"^## treering (.+)\n", text, flags=re.M)[1:]
    return {name: Section(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


DOCS = sections()


def commands() -> dict[str, Any]:
    def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for inner in command.commands.values():
                yield from walk(inner, f"{name} {inner.name}")
        else:
            yield name.strip(), command

    return dict(walk(typer.main.get_command(app), ""))


@pytest.fixture
def shop(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "shop", symlinks=True))


class Runner:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def text(self, *arguments: object, code: int = 0, stdin: str = "") -> tuple[str, str]:
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self.capsys.readouterr()
        got = run([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        assert got == code, err
        return out, err

    def json(self, *arguments: object, code: int = 0, stdin: str = "") -> Any:
        """The one object on standard output, with the keys that are documented."""
        out, err = self.text(*arguments, "--json", code=code, stdin=stdin)
        assert out.count("\n") == 1, out
        found = json.loads(out)
        if "error" in found:
            assert found == {"error": found["error"], "exit_code": code}
            assert found["error"] in err
        else:
            words = [str(argument) for argument in arguments]
            DOCS[words[0] if words[0] in DOCS else " ".join(words[:2])].check(found)
        return found


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(capsys, monkeypatch)


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# The page and the program


def test_every_command_is_documented_and_every_documented_command_exists() -> None:
    assert set(DOCS) == set(commands())


@pytest.mark.parametrize("name", sorted(commands()))
def test_options_are_those_documented(name: str) -> None:
    options = {option for parameter in commands()[name].params for option in parameter.opts if option[:2] == "--"}
    common = {"--json"} if name.startswith("bench ") else {"--json", "--workspace"}
    assert common <= options
    assert options - common == DOCS[name].options
    assert f"treering {name}" in DOCS[name].text
    assert DOCS[name].text.count("```") == 4  # Its form, and an example.
    assert DOCS[name].keys


# Reading


@pytest.mark.parametrize(
    "command", ["status", "versions", "show v1", "show current", "compare v1 v2", "verify", "history", "canary"]
)
def test_reading_commands(cli: Runner, made: Path, command: str) -> None:
    assert cli.json(*command.split(), "-w", made)
    out, _ = cli.text(*command.split(), "--workspace", made)
    assert out.strip()


def test_what_the_reading_commands_say(cli: Runner, made: Path) -> None:
    status = cli.json("status", "-w", made)
    assert (status["current"], status["versions"], status["waiting"]) == ("v2", 2, {"hats": 9})
    assert status["rows"] == {"train": 45, "held_out": 5, "quarantined": 0}
    assert [v["name"] for v in cli.json("versions", "-w", made)["versions"]] == ["v1", "v2"]
    assert cli.json("show", "v2", "-w", made)["parent"] == "v1"
    moves = cli.json("history", "-w", made)["events"]
    assert [(e["event"], e["version"]) for e in moves] == [("version.promoted", "v1"), ("version.promoted", "v2")]
    compared = cli.json("compare", "v1", "v2", "-w", made)
    assert compared["versions"] == ["v1", "v2"] and compared["tasks"]["pens"]["rows"] == 2
    out, _ = cli.text("versions", "-w", made)
    assert out.splitlines()[1].startswith("* v2")


def test_names_of_ones_own(cli: Runner, shop: Path) -> None:
    assert cli.text("alias", "-w", shop)[0] == "no alias yet\n"
    assert cli.json("alias", "champion", "current", "-w", shop) == {"aliases": {"champion": "v2"}}
    cli.json("alias", "champion", "v1", "-w", shop)
    assert cli.json("tag", "champion", "audited", "-w", shop) == {"version": "v1", "tags": ["audited"]}
    assert cli.json("note", "v1", " before the change ", "-w", shop)["notes"][0]["text"] == "before the change"
    found = cli.json("show", "champion", "-w", shop)
    assert (found["name"], found["aliases"], found["tags"]) == ("v1", ["champion"], ["audited"])
    assert "[champion, #audited]" in cli.text("versions", "-w", shop)[0].splitlines()[0]
    assert cli.json("compare", "champion", "v2", "-w", shop)["versions"] == ["v1", "v2"]
    assert cli.json("rollback", "champion", "-w", shop) == {"current": "v1"}
    assert cli.json("alias", "champion", "--delete", "-w", shop) == {"aliases": {}}
    assert cli.json("tag", "v1", "audited", "--delete", "-w", shop)["tags"] == []
    for words in ("alias x", "alias x --delete", "alias current v1", "alias v9 v1", "alias a/b v1", "alias x v9"):
        cli.text(*words.split(), "-w", shop, code=3)
    for words in ("tag v1 audited --delete", "tag v1 a/b", "note v9 text"):
        cli.text(*words.split(), "-w", shop, code=3)
    cli.text("note", "v1", " ", "-w", shop, code=3)
    cli.text("show", "champion", "-w", shop, code=3)


def test_evaluate(cli: Runner, made: Path, tmp_path: Path) -> None:
    assert set(cli.json("evaluate", "-w", made)["tasks"]) == {"pens", "cups", "hats"}
    assert set(cli.json("evaluate", "v1", "--task", "pens", "-w", made)["tasks"]) == {"pens"}
    assert cli.json("evaluate", "base", "--task", "pens", "-w", made)["version"] == "base"
    rows: list[dict[str, Any]] = [*toy_rows("caps", 4), {"text": "no answer", "label": ""}]
    found = cli.json("evaluate", "v1", "--data", write_rows(tmp_path / "c.jsonl", rows), "--task", "caps", "-w", made)
    assert found["tasks"]["caps"]["rows"] == 4
    assert len(found["quarantined"]) == 1 and "c.jsonl, line 5" in found["quarantined"][0]
    assert "no held-out rows of task 'x'" in cli.json("evaluate", "--task", "x", "-w", made, code=3)["error"]
    out, _ = cli.text("evaluate", "--task", "pens", "-w", made)
    assert out.startswith("v2:\npens: ")


@pytest.mark.parametrize(("version", "name"), [("base", "base"), ("v1", "v1"), (None, "v2")])
def test_predict(cli: Runner, made: Path, tmp_path: Path, version: str | None, name: str) -> None:
    source = write_rows(tmp_path / "in.jsonl", [*toy_rows("pens", 2), {"prompt": "and now?"}, {"odd": 1}])
    target = tmp_path / "out.jsonl"
    named = [version] if version else []
    found = cli.json("predict", *named, "--input", source, "--output", target, "-w", made)
    assert (found["version"], found["rows"], len(found["quarantined"])) == (name, 3, 1)
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [set(line) for line in lines] == [{"messages", "prediction", "answer", "version"}] * 2 + [
        {"messages", "prediction", "version"}
    ]
    assert lines[0]["answer"] == "pens a" and lines[0]["version"] == name


def test_predict_leaves_its_input_alone(cli: Runner, made: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", toy_rows("pens", 2))
    kept = source.read_bytes()
    error = cli.json("predict", "--input", source, "--output", source, "-w", made, code=3)["error"]
    assert "is the --input itself" in error and source.read_bytes() == kept


def test_update_tells_what_became_of_the_inbox(cli: Runner, shop: Path) -> None:
    write_rows(shop / "inbox" / "hats" / "bad.jsonl", [{"odd": 1}] * 12)
    found = cli.json("update", "-w", shop, "--no-promote")
    assert found["ingested"]["quarantined"] == 12 and len(found["ingested"]["refused"]) == 12
    write_rows(shop / "inbox" / "hats" / "worse.jsonl", [{"odd": 2}] * 11)
    out, _ = cli.text("ingest", "-w", shop)
    assert out.count("worse.jsonl, line") == 10 and "bad.jsonl" not in out and "and 1 more" in out


def test_predict_names_a_place_it_cannot_write_to(cli: Runner, made: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", toy_rows("pens", 2))
    for target in (tmp_path / "none" / "out.jsonl", tmp_path):
        found = cli.json("predict", "--input", source, "--output", target, "-w", made, code=3)
        assert str(target) in found["error"]
    assert "--output" in cli.json("predict", "--input", source, "-w", made, code=3)["error"]
    assert "none.jsonl" in cli.json("predict", "--input", "none.jsonl", "--output", "o", "-w", made, code=3)["error"]


def test_chat(cli: Runner, made: Path) -> None:
    assert cli.json("chat", "base", "-w", made, stdin="hello")["version"] == "base"
    assert cli.json("chat", "-w", made, stdin="hello")["version"] == "v2"
    out, err = cli.text("chat", "v1", "-w", made, stdin="hello\nand now?\n\nnot read")
    assert out.count("\n") >= 2
    assert err.startswith("v1;")


# Changing


def test_init(cli: Runner, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder.parent)
    found = cli.json("init", tmp_path / "a", "--model", model_folder.name)
    assert found["settings"] == {"model_name_or_path": str(model_folder)}  # Works from any folder.
    assert found["workspace"] == str(tmp_path / "a") and found["version"] is None
    assert "is a workspace already" in cli.json("init", tmp_path / "a", code=3)["error"]
    assert cli.json("status", "-w", tmp_path / "a")["current"] is None
    out, _ = cli.text("versions", "-w", tmp_path / "a")
    assert out == "no version yet\n"
    cli.json("init", "-w", tmp_path / "b")
    assert Workspace(tmp_path / "b").config().model_name_or_path is None
    assert "adapter_config.json" in cli.json("init", tmp_path / "c", "--adapter", tmp_path, code=3)["error"]
    assert not (tmp_path / "c").exists()


def test_init_from_another_tools_file(cli: Runner, tmp_path: Path, model_folder: Path) -> None:
    source = tmp_path / "train.yaml"
    source.write_text(f"model_name_or_path: {model_folder}\nlora_rank: 4\ntemplate: llama3\n", encoding="utf-8")
    found = cli.json("init", tmp_path / "ws", "--from", source)
    assert found["settings"]["lora_rank"] == 4
    assert set(found["not_carried"]) == {"template"}
    out, _ = cli.text("init", tmp_path / "ws2", "--from", source)
    assert "not carried over: template (" in out


def test_rows_in_by_what_is_told_and_out_again(cli: Runner, shop: Path, tmp_path: Path) -> None:
    (tmp_path / "faq.txt").write_bytes("frage;antwort;label\n订单什么时候到？;一般三天就到了;x\n".encode("gbk"))
    told = ["--task", "faq", "--format", "csv", "--columns", "question=frage,answer=antwort"]
    found = cli.json("ingest", tmp_path / "faq.txt", *told, "-w", shop)
    assert (found["tasks"], len(found["notices"])) == ({"faq": 1}, 1)
    out, _ = cli.text("ingest", tmp_path / "faq.txt", *told, "-w", shop)
    assert f"note: {tmp_path / 'faq.txt'}: it is not UTF-8 and was read as GB18030" in out
    target = tmp_path / "faq.json"
    wanted = ["--format", "alpaca", "--task", "faq", "--out", target]
    assert cli.json("data", "export", *wanted, "-w", shop)["rows"] == 1
    assert json.loads(target.read_text(encoding="utf-8"))[0]["output"] == "一般三天就到了"
    out, _ = cli.text("data", "export", *wanted, "-w", shop)
    assert out == f"1 rows written to {target}\n"
    error = cli.json("data", "export", "--split", "val", *wanted, "-w", shop, code=3)["error"]
    assert error == "--split 'val' is not known; it is train or held_out"
    assert "gopher:// is not read" in cli.json("ingest", "gopher://x/y.jsonl", "-w", shop, code=3)["error"]


def test_ingest_counts(cli: Runner, shop: Path, tmp_path: Path) -> None:
    rows = [*toy_rows("caps", 10), toy_rows("caps", 1)[0], {"text": "?", "label": ""}, {"odd": "1"}]
    found = cli.json("ingest", write_rows(tmp_path / "caps.jsonl", rows), "-w", shop)
    assert [(row["line"], row["rule"]) for row in found.pop("refused")] == [(12, "no-answer"), (13, "unknown-format")]
    assert found == {
        "rows": 13,
        "accepted": 10,
        "duplicates": 1,
        "quarantined": 2,
        "held_out": 1,
        "tasks": {"caps": 10},
        "reasons": {"no-answer": 1, "unknown-format": 1},
        "near": 0,
        "superseded": 0,
        "withdrawn": 0,
        "restored": 0,
        "mended": {},
        "warned": {},
        "notices": [],
        "replaced": [],
    }
    out, _ = cli.text("ingest", tmp_path / "caps.jsonl", "--task", "caps", "-w", shop)
    assert out.startswith("13 rows: 0 accepted (0 held out), 11 duplicates, 2 quarantined\n")
    assert "caps.jsonl, line 12: " in out

    write_rows(shop / "inbox" / "socks" / "june.jsonl", toy_rows("socks", 10))
    assert cli.json("status", "-w", shop)["inbox"] == ["socks/june.jsonl"]
    assert cli.json("ingest", "-w", shop)["tasks"] == {"socks": 10}
    assert cli.json("ingest", "-w", shop)["rows"] == 0

    judge = write_rows(tmp_path / "judge.jsonl", toy_rows("belts", 4))
    learn = write_rows(tmp_path / "learn.jsonl", toy_rows("belts", 10))
    found = cli.json("ingest", learn, "--task", "belts", "--held-out", judge, "-w", shop)
    assert (found["accepted"], found["held_out"], found["duplicates"]) == (10, 4, 4)


def test_plan_says_what_update_then_does(
    cli: Runner, shop: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    out, _ = cli.text("plan", "-w", shop)
    assert out.startswith("an update of v2\n  hats: 9 new rows\n2 steps, ")
    assert "\nneeds: " in out and "\nfree: " in out
    request.getfixturevalue("no_children")  # From here on; the first was planned by a process of its own.
    monkeypatch.setattr("treering.room.room", lambda _: {"memory_mb": 100.0, "disk_mb": 1e6})
    planned = cli.json("plan", "-w", shop, code=1)
    assert planned["problems"][0].startswith("memory: ")
    assert (planned["parent"], planned["rows"], planned["held_out"]["hats"]) == ("v2", {"hats": 9}, 1)
    assert "it will not fit: memory: " in cli.text("plan", "-w", shop, code=1)[0]
    assert "will not fit" in cli.json("update", "-w", shop, code=1)["error"]
    monkeypatch.undo()
    found = cli.json("update", "gate.floor=1.0", "-w", shop, code=0)
    assert found["estimate"] is None and found["cost"]["steps"] == 2
    assert cli.json("plan", "-w", shop)["estimate"] is None
    assert cli.text("plan", "-w", shop)[0].startswith("nothing new: ")


def test_plan_says_at_most_where_the_parent_is_to_write(
    cli: Runner, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = Estimate(2, 16, 1.0, 3.0, 9.0, None, 5.0, rows_written=7)
    monkeypatch.setattr("treering.automate.children.run", lambda *_: Answer(asdict(estimate)))
    out, _ = cli.text("plan", "-w", shop)
    assert "\n  at most 7 rows that the parent writes\nat most 2 steps, 16 rows with repeats" in out


def test_update_promotes_and_finds_nothing_new(cli: Runner, shop: Path) -> None:
    found = cli.json("update", "memory.size=3", "gate.floor=0.5", "eval.max_new_tokens=3", "-w", shop)
    assert (found["status"], found["version"], set(found["scores"])) == ("promoted", "v3", {"pens", "cups", "hats"})
    assert Path(found["report"]).is_file()
    config = cli.json("show", "v3", "-w", shop)["config"]
    assert (config["memory"]["size"], config["gate"]["floor"], config["eval"]["max_new_tokens"]) == (3, 0.5, 3)
    assert (config["memory"]["policy"], config["max_steps"]) == ("balanced", 2)
    assert cli.json("update", "-w", shop)["status"] == "nothing new"
    out, _ = cli.text("update", "-w", shop)
    assert out.startswith("nothing new: ")


def test_update_held_by_the_gate_is_exit_2(cli: Runner, shop: Path) -> None:
    held = cli.json("update", "gate.min_gain=1", "--no-promote", "-w", shop, code=2)
    assert (held["status"], held["version"], held["verdict"]["promote"]) == ("held", "v3", False)
    again = cli.json("update", "gate.min_gain=1", "-w", shop, code=2)
    assert again["version"] == "v3" and "was already made" in again["reason"]
    out, _ = cli.text("update", "gate.min_gain=1", "-w", shop, code=2)
    assert out.startswith("held: v3 was already made of these rows")
    kept = cli.json("update", "max_steps=3", "--no-promote", "-w", shop)
    assert (kept["status"], kept["version"], kept["verdict"]["promote"]) == ("held", "v4", True)
    assert cli.json("status", "-w", shop)["current"] == "v2"
    assert "--force" in cli.json("promote", "v3", "-w", shop, code=3)["error"]
    assert cli.json("promote", "v3", "--force", "-w", shop) == {"current": "v3"}
    assert cli.json("promote", "v4", "-w", shop) == {"current": "v4"}
    assert cli.json("rollback", "-w", shop) == {"current": "v3"}
    assert cli.json("rollback", "v1", "-w", shop) == {"current": "v1"}
    assert cli.json("status", "-w", shop)["waiting"] == {"cups": 18, "hats": 9}
    assert cli.json("rollback", "-w", shop) == {"current": None}
    assert cli.json("evaluate", "--task", "pens", "-w", shop)["version"] == "base"
    assert "nothing to roll back" in cli.json("rollback", "-w", shop, code=3)["error"]


def test_canary(cli: Runner, shop: Path) -> None:
    assert cli.json("canary", "v1", "--share", "0.25", "-w", shop)["share"] == 0.25
    counted: list[tuple[figures.Arm, str]] = [("canary", "v1"), ("control", "v2")]
    for arm, by in counted:
        now = datetime.now(UTC)
        line = figures.Line(version="v1", mode="canary", arm=arm, by=by, start=now, end=now)
        line.count(0.5, 7)
        figures.append(Workspace(shop), line)
    found = cli.json("canary", "v1", "--shadow", "-w", shop)
    assert (found["mode"], found["ended"], len(found["arms"]), len(found["comparisons"])) == ("shadow", None, 2, 1)
    assert cli.json("canary", "--off", "-w", shop)["reason"] == "turned off"
    out, _ = cli.text("canary", "-w", shop)
    assert out.startswith("v1 was on trial in shadow, since 20") and "turned off" in out
    assert "canary (v1): 1 requests, 0 failed; 0.500 s in the mean" in out and "no difference is shown" in out
    assert "not both" in cli.json("canary", "v1", "--off", "-w", shop, code=3)["error"]
    assert "name the version" in cli.json("canary", "--shadow", "-w", shop, code=3)["error"]
    assert "is current" in cli.json("canary", "v2", "-w", shop, code=3)["error"]


def test_rollback_with_its_rows(cli: Runner, shop: Path) -> None:
    before = cli.json("status", "-w", shop)
    learned = sum(map(len, cli.json("show", "v2", "-w", shop)["rows"].values()))
    out, _ = cli.text("rollback", "--quarantine-data", "-w", shop)
    assert out.startswith("v1 serves; rows learned since are in quarantine")
    after = cli.json("status", "-w", shop)
    assert after["waiting"] == before["waiting"] and after["rolled_back"] == {}
    listed = cli.json("quarantine", "list", "-w", shop)["rows"]
    assert {entry["reason"] for entry in listed} == {"v2, which learned it, was rolled back"}
    held_out = [entry["number"] for entry in listed if entry["split"] == "held_out"]
    assert len(listed) - len(held_out) == learned and held_out
    numbers = [str(entry["number"]) for entry in listed]
    assert cli.json("quarantine", "release", *numbers, "-w", shop)["accepted"] == len(numbers)
    assert cli.json("status", "-w", shop)["rows"] == before["rows"]


def gone_back(cli: Runner, shop: Path) -> Path:
    cli.text("rollback", "base", "-w", shop)
    return shop


def test_the_gate_again(cli: Runner, shop: Path) -> None:
    made = cli.json("show", "v2", "-w", shop)["verdict"]
    found = cli.json("gate", "v2", "--dry-run", "-w", shop)
    assert (found["version"], found["against"], found["promoted"]) == ("v2", "v1", False)
    assert found["judgements"] == made["judgements"] and found["promote"]
    out, _ = cli.text("gate", "v2", "gate.min_gain=1", "gate.margin=0", "--dry-run", "-w", shop, code=2)
    assert out.startswith("v2 against v1: held: ")
    cli.text("rollback", "-w", shop)
    assert cli.json("gate", "v2", "-w", shop)["promoted"]
    assert cli.json("status", "-w", shop)["current"] == "v2"
    held = cli.json("gate", "v1", "--dry-run", "-w", shop, code=2)
    assert held["summary"] == "held: it was never measured on cups, which v2 knows"
    assert "promote v1 first" in cli.text("gate", "v2", "-w", gone_back(cli, shop), code=3)[1]
    cli.text("promote", "v1", "--force", "-w", shop)
    cli.text("promote", "v2", "--force", "-w", shop)
    assert "not promoted" in cli.text("gate", "v2", "gate.margin=1", "-w", shop, code=3)[1]


def test_prune(cli: Runner, shop: Path) -> None:
    cli.text("prune", "-w", shop, code=3)
    would = cli.json("prune", "--keep", 1, "--dry-run", "-w", shop)
    assert list(would["pruned"]) == ["v1"] and would["kept"] == {"v2": "is current"}
    out, _ = cli.text("prune", "--keep", 1, "-w", shop)
    assert "v2 stays whole: it is current" in out and "v1 keeps its records alone" in out
    assert "[pruned]" in cli.text("versions", "-w", shop)[0].splitlines()[0]
    assert cli.json("show", "v1", "-w", shop)["pruned"]
    assert "v1 was pruned" in cli.text("rollback", "-w", shop, code=1)[1]
    assert "v1 was pruned" in cli.text("evaluate", "v1", "-w", shop, code=1)[1]


def test_verify_finds_an_edited_file(cli: Runner, shop: Path) -> None:
    with (shop / "versions" / "v1" / "adapter_config.json").open("a") as file:
        file.write(" ")
    found = cli.json("verify", "-w", shop, code=1)
    assert not found["ok"]
    assert found["problems"] == ["v1: adapter_config.json was changed since the version was made"]
    out, _ = cli.text("verify", "-w", shop, code=1)
    assert "adapter_config.json" in out


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], "nosuch"),
        (["show"], "Missing argument"),
        (["update", "--bad"], "--bad"),
        (["predict"], "Missing option"),
        (["status", "surplus"], "surplus"),
        (["status", "-w", "."], "is no workspace"),
        (["bench", "quality", "--data", "x", "--rows", "zero"], "'--rows'"),
        (["bench", "quality", "--data", "x", "--rows", "0"], "'--rows'"),
        (["bench", "quality", "--data", "x", "--rows", "1", "--per-label", "1"], "not both"),
        (["bench", "quality", "--data", "x", "--seeds", "one"], "--seeds is 'one'"),
        (["bench", "quality", "--data", "none"], "none is no folder"),
        (["bench", "quality", "--data", "none", "--methods", "best"], "unknown methods: best; known: untouched"),
        (["status", "-w", "nowhere"], "is no workspace"),
        (["init", "ws", "--from", "none.yaml"], "none.yaml does not exist"),
    ],
)
def test_usage_errors_are_exit_3(
    cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = cli.text(*arguments, code=3)
    assert out == "" and err.startswith("treering: ") and words in err
    assert words in cli.json(*arguments, code=3)["error"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["show v9", "compare v1 v9", "promote v9", "rollback v9", "evaluate v9", "chat v9"])
def test_unknown_versions_are_exit_3(cli: Runner, made: Path, command: str) -> None:
    error = cli.json(*command.split(), "-w", made, code=3)["error"]
    assert error == "there is no version 'v9'; there are: v1, v2"


def test_config_errors_come_all_at_once_with_near_names(cli: Runner, made: Path) -> None:
    wrong = [
        "lora_rnk=3",
        "gate.margn=1",
        "gate.floor=high",
        "learning_rate=fast",
        "memory=3",
        "protect=replya",
        "plain",
    ]
    error = cli.json("update", *wrong, "-w", made, code=3)["error"]
    assert error.splitlines() == [
        "treering.yaml: 7 wrong setting(s), nothing was changed:",
        "  'plain' is not key=value",
        f"  protect: unknown name, did you mean 'replay'?; known: {', '.join(PROTECT)} (got 'replya')",
        "  learning_rate: must be a valid number or 'auto' (got 'fast')",
        f"  memory: is a group; set one of {', '.join(f'memory.{key}' for key in MemoryConfig.model_fields)} (got 3)",
        "  gate.floor: must be a valid number (got 'high')",
        "  gate.margn: unknown setting, did you mean 'margin'?",
        "  lora_rnk: unknown setting, did you mean 'lora_rank'?",
    ]


def test_no_permission_is_a_message(cli: Runner, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "treering.db")

    monkeypatch.setattr(registry, "versions", refuse)
    assert "treering.db" in cli.json("versions", "-w", made, code=1)["error"]


def test_interrupted(cli: Runner, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "versions", interrupt)
    assert cli.json("versions", "-w", made, code=130)["error"] == "interrupted"


# Real processes


def test_help_and_status_load_no_model_library(made: Path) -> None:
    program = (
        "import sys\nfrom treering.cli import run\n"
        f"codes = run(['--help']), run(['bench', '--help']), run(['status', '-w', {str(made)!r}])\n"
        "assert codes == (0, 0, 0), codes\n"
        "assert not {'torch', 'transformers', 'peft', 'pyarrow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: treering " in done.stdout and "v2 is current" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"), [("--version", 0), ("status --json", 3), ("nosuch", 3), ("verify --json", 1)]
)
def test_the_program(shop: Path, tmp_path: Path, arguments: str, code: int) -> None:
    (shop / "versions" / "v1" / "README").touch()
    folder = shop if code == 1 else tmp_path
    program = Path(sys.executable).with_name("treering")
    done = subprocess.run([program, *arguments.split()], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code
    if code == 0:
        assert done.stdout == "treering 0.1.0\n"
    elif "--json" in arguments:
        assert json.loads(done.stdout)
    else:
        assert (done.stdout, done.stderr) == ("", "treering: No such command 'nosuch'.\n")


# Benchmark


@pytest.mark.soak
def test_bench_speed(cli: Runner, tmp_path: Path, model_folder: Path) -> None:
    """A real race on a tiny model: turns, losses and memory of both are told, and the losses agree."""
    rows = [{"text": row["text"], "label": row["label"]} for row in toy_rows("pens", 48)]
    write_rows(tmp_path / "data" / "train.jsonl", rows[:42])
    write_rows(tmp_path / "data" / "test.jsonl", rows[42:])
    options = ["bf16=false", "per_device_train_batch_size=4", "--data", tmp_path / "data", "--model", model_folder]
    found = cli.json("bench", "speed", *options, "--peers", "trainer-fp32,generate", "--turns", 2, "--steps", 3)
    assert (
        set(found["examples_per_second"])
        == set(found["peak_memory_mb"])
        == {"treering", "distillation", "trainer-fp32"}
    )
    assert all(speed > 0 for speed in found["examples_per_second"].values())
    assert found["batches"]["rows"] == 2 * 3 * 4 and found["times_faster"].keys() == {"trainer-fp32"}
    assert [len(losses) for losses in found["losses"].values()] == [8, 8, 8]
    assert found["loss_gap"] < 0.01 and found["losses"]["treering"][-1] < found["losses"]["treering"][0]
    assert 0 < found["flops_share"] < 1
    scored = found["evaluation"]
    assert scored["rows"] == 6 and scored["rows_per_second"].keys() == scored["right"].keys() == {
        "treering",
        "generate",
    }
    assert all(speed > 0 for speed in scored["rows_per_second"].values()) and scored["times_faster"]["generate"] > 0
    small = ["--data", tmp_path / "data", "--model", model_folder]
    assert "a batch needs 99" in cli.text("bench", "speed", "per_device_train_batch_size=99", *small, code=3)[1]
    assert "known: trainer-fp32" in cli.text("bench", "speed", *small, "--peers", "best", code=3)[1]
    (tmp_path / "model").mkdir()
    wrong = ["--data", tmp_path / "data", "bf16=false", "per_device_train_batch_size=4", "lora_target=nowhere"]
    assert "treering ended" in cli.text("bench", "speed", *wrong, "--model", model_folder, "--peers", "", code=1)[1]


def test_bench_quality(cli: Runner, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first method in a process of its own; what comes of runs in detail is tested in tests/bench."""
    for task in ("pens", "cups"):
        write_rows(tmp_path / "data" / task / "train.jsonl", toy_rows(task, 16))
        write_rows(tmp_path / "data" / task / "test.jsonl", toy_rows(task, 24)[16:])
    quick = ["bf16=false", "max_steps=1", "eval.max_new_tokens=4"]
    options = [*quick, "--data", tmp_path / "data", "--model", model_folder, "--work", tmp_path / "work"]
    assert list(cli.json("bench", "quality", *options, "--methods", "naive")["methods"]) == ["naive"]
    monkeypatch.setattr("treering.bench.runs.multiprocessing.get_context", InProcess)
    wanted = ["--methods", "naive,replay:memory.size=4", "--baseline", "naive", "--out", tmp_path / "out"]
    found = cli.json("bench", "quality", *options, *wanted)
    assert list(found["methods"]) == ["naive", "replay:memory.size=4"]
    assert found["stream"]["tasks"] == {task: {"train": 16, "test": 8} for task in ("cups", "pens")}
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8")) == found
    out, err = cli.text("bench", "quality", *options, *wanted)  # Read back: no update is told of.
    assert "update 1" not in err and "average" in out.splitlines()[0]
    assert "not judged: one seed" in out and "replay:memory.size=4" in out
    lost = ["--data", tmp_path / "data", "--model", "./none", "--methods", "naive"]
    assert "none" in cli.json("bench", "quality", *lost, code=1)["error"]
    wrong = [*options, "lora_target=nowhere", "--methods", "naive"]
    assert "method naive ended with exit code 3" in cli.json("bench", "quality", *wrong, code=1)["error"]
    assert "memory.size" in cli.json("bench", "quality", *options, "--memory", "lots", code=3)["error"]


def test_forget(cli: Runner, shop: Path, tmp_path: Path) -> None:
    here = ("--workspace", shop)
    assert cli.json("forget", "--rebuild", *here) == {"found": 0, "alike": 0, "files": {}}
    [trained, *_] = Workspace(shop).catalog.train_ids("pens")
    ids = tmp_path / "ids"
    ids.write_text(trained)
    looked = cli.json("forget", "--ids", ids, "--dry-run", *here)
    assert looked == {"found": 1, "alike": 0, "files": {"<python>": 1}}
    done = cli.json("forget", "--ids", ids, "--yes", "--rebuild", *here)
    assert (done["rows"], done["rebuilt"]["from"]) == (1, "base")
    out, _ = cli.text("forget", "--where", "text~cups item 3", "--yes", *here)
    assert out.startswith("1 row deleted, not to come in again")
    assert cli.json("rollback", "base", *here) == {"current": None}


def test_memory_that_runs_out_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none(*_: object, **__: object) -> None:
        try:
            raise MemoryError
        except MemoryError:
            raise SystemError("nothing works") from None

    monkeypatch.setattr("treering.cli.app", none)
    assert run(["status"]) == 1
    assert "treering: out of memory (nothing works). Set optim: adamw_8bit" in capsys.readouterr().err
    assert run(["ingest", "a.jsonl"]) == 1
    assert "treering: out of memory (nothing works). Name fewer or smaller files" in capsys.readouterr().err
