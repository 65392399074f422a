"""The settings page is what the settings say, and every shipped configuration runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import get_args
from xml.etree import ElementTree

import pytest

from treering import Workspace
from treering.config import Config
from treering.methods import FINETUNING_TYPES, PROTECT
from treering.sections import MemoryConfig, Section
from treering.testing import toy_rows

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_docs() -> ModuleType:
    return script("make_docs")


def test_the_settings_page_is_up_to_date(make_docs: ModuleType) -> None:
    assert make_docs.main(["--check"]) == 0


def test_an_old_page_is_told_and_written_anew(
    make_docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_docs, "PAGE", tmp_path / "configuration.md")
    assert make_docs.main(["--check"]) == 1
    assert make_docs.main([]) == 0
    assert make_docs.main(["--check"]) == 0
    with (tmp_path / "configuration.md").open("a") as page:
        page.write("more\n")
    assert make_docs.main(["--check"]) == 1


def test_every_setting_has_a_row_with_its_meaning(make_docs: ModuleType) -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \|.*\| (.+) \|$", make_docs.page(), re.M))
    groups = {name for name, value in Config() if isinstance(value, Section)}
    inner = {f"{group}.{key}" for group in groups for key in type(getattr(Config(), group)).model_fields}
    assert set(rows) == set(Config.model_fields) - groups | inner
    assert all(meaning.endswith(".") for meaning in rows.values())


def test_the_page_of_methods_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| `([\w]+)` ", (ROOT / "docs" / "methods.md").read_text(), re.M)
    policies = get_args(MemoryConfig.model_fields["policy"].annotation)
    mixes = get_args(MemoryConfig.model_fields["mix"].annotation)
    compositions = get_args(Config.model_fields["adapter_composition"].annotation)
    assert set(rows) == {*FINETUNING_TYPES, *PROTECT, *policies, *mixes, *compositions}


def test_the_page_of_the_long_tests_lists_each_with_its_figures() -> None:
    results = ElementTree.fromstring("""<testsuites><testsuite>
        <testcase classname="tests.soak.test_month" name="test_a_month" time="840">
            <properties><property name="requests" value="3000"/></properties></testcase>
        <testcase classname="tests.test_crash" name="test_killed[first]" time="60"><failure>...</failure></testcase>
        </testsuite></testsuites>""")
    assert script("soak").page(results, "2026-11-22", "abc1234").splitlines()[2:] == [
        "`make soak`, 2026-11-22, commit abc1234.",
        "",
        "| test | outcome | minutes | figures |",
        "| --- | --- | --- | --- |",
        "| `tests/soak/test_month.py::test_a_month` | passed | 14.0 | requests: 3000 |",
        "| `tests/test_crash.py::test_killed[first]` | failed | 1.0 |  |",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_valid(path: Path, tmp_path: Path) -> None:
    head = path.read_text(encoding="utf-8").splitlines()[:3]
    assert [line.startswith("# ") for line in head] == [True, True, False]
    assert head[1] == f"# Use it: cp configs/{path.name} WORKSPACE/treering.yaml"
    ws = Workspace.create(tmp_path / "ws")
    shutil.copy(path, ws.root / "treering.yaml")
    assert ws.config() == Config.load(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_runs(path: Path, tmp_path: Path, model_folder: Path) -> None:
    ws = Workspace.create(tmp_path / "ws")
    tiny = f"\nmodel_name_or_path: {model_folder}\nbf16: false\nmax_steps: 1\n"
    text = path.read_text(encoding="utf-8").replace("freeze_trainable_layers: 4", "freeze_trainable_layers: 1")
    text = re.sub(r"^model_name_or_path: .*\n", "", text, flags=re.M)
    (ws.root / "treering.yaml").write_text(text + tiny, encoding="utf-8")
    ws.ingest(toy_rows("pens", 10), task="pens")
    assert ws.update("eval.max_new_tokens=2") is not None
    ws.ingest(toy_rows("cups", 10), task="cups")
    version = ws.update("eval.max_new_tokens=2")
    assert version is not None and version.manifest["config"]["finetuning_type"] == ws.config().finetuning_type


def test_the_scenarios_are_there() -> None:
    names = {path.stem for path in CONFIGS}
    assert names == {
        "laptop",
        "gpu",
        "dora",
        "qlora",
        "adapter",
        "norm",
        "full",
        "freeze",
        "importance",
        "replay_only",
        "sequential",
    }
