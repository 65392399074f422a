"""What lies in deploy/ is checked as far as it can be without a cluster, Docker or Airflow."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from treering.automate.rules import cron
from treering.cli import app
from treering.model import cache_folder

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
MUST = os.environ.get("CI") == "true"


def commands_of(text: str) -> list[list[str]]:
    """The calls of `treering` in a file, word by word."""
    return [line.split() for line in re.findall(r"treering ((?:watch|serve)\b[^\"'`\n]*)", text)]


def test_every_call_of_treering_is_one_that_exists() -> None:
    import typer

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name: {option for parameter in known[name].params for option in parameter.opts} for name in known}
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    calls = [words for path in files for words in commands_of(path.read_text())]
    calls += [cronjob_container()["args"], *(service["command"] for service in compose()["services"].values())]
    assert len(calls) >= 7
    for words in calls:
        assert {word for word in words if word.startswith("-")} <= options[words[0]], words


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_what_systemd_takes(unit: Path, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        assert not MUST, "install systemd, which brings systemd-analyze"
        pytest.skip("no systemd-analyze here")
    for path in UNITS:
        text = path.read_text()
        assert path.suffix == ".timer" or re.search(r"ExecStart=/opt/treering/bin/treering (watch|serve) ", text)
        (tmp_path / path.name).write_text(text.replace("/opt/treering/bin/treering", "/bin/true"))
    done = subprocess.run(
        [program, "verify", "--man=no", tmp_path / unit.name], capture_output=True, text=True, check=False
    )
    # It ends with 0 for keys that it does not know, too; then it says so.
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def cronjob() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / "cronjob.yaml").read_text()))


def cronjob_container() -> dict[str, Any]:
    (container,) = cronjob()[1]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("version", ["1.28", "1.34"])
def test_the_cronjob_is_what_kubernetes_takes(version: str) -> None:
    if not MUST:
        pytest.importorskip("kubernetes_validate")
    import kubernetes_validate

    for manifest in cronjob():
        kubernetes_validate.validate(manifest, version, strict=True)
    broken = cronjob()[1]
    broken["spec"]["jobTemplate"]["spec"]["template"]["spec"]["restartPolice"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_the_cronjob_fits_together() -> None:
    claim, job = cronjob()
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert cronjob_container()["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    assert cron(job["spec"]["schedule"])
    assert job["spec"]["concurrencyPolicy"] == "Forbid" and pod["restartPolicy"] == "Never"


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


def test_the_compose_file_fits_together() -> None:
    """There is no validator without Docker: keys are compared with those of the Compose file reference."""
    found = compose()
    assert set(found) == {"services", "volumes", "secrets"}
    both = {
        "build",
        "image",
        "command",
        "user",
        "init",
        "stop_grace_period",
        "restart",
        "environment",
        "volumes",
        "security_opt",
    }
    services = found["services"]
    assert set(services["serve"]) == both | {"ports"}
    assert set(services["watch"]) == both | {"depends_on", "secrets"}
    assert services["serve"]["build"] == services["watch"]["build"]
    assert set(services["watch"]["depends_on"]) < set(services)
    assert set(services["watch"]["secrets"]) == set(found["secrets"])
    for service in services.values():
        names = {mount.split(":")[0] for mount in service["volumes"]}
        assert {name for name in names if not name.startswith("./")} == set(found["volumes"])
    built = services["serve"]["build"]
    assert (DEPLOY / built["context"]).resolve() == ROOT
    assert (ROOT / built["dockerfile"]).is_file()
    # On this machine alone, whatever the address inside the container.
    assert services["serve"]["ports"] == ["127.0.0.1:8000:8000"]


def test_the_image_copies_what_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((ROOT / source).exists() for source in sources.split())
    assert '["treering"]' in text


def test_models_are_kept_where_they_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model is fetched into the cache; a home may be out of reach, or gone with the pod."""
    folders = {}
    for unit in (path for path in UNITS if path.suffix == ".service"):
        text = unit.read_text()
        assert "CacheDirectory=treering" in text
        folders[unit.name] = dict(pair.split("=") for pair in re.findall(r"^Environment=(.+)$", text, re.M)[0].split())
        assert folders[unit.name]["XDG_CACHE_HOME"] == "/var/cache/treering"
    for name, service in compose()["services"].items():
        folders[name] = service["environment"]
        assert f"models:{service['environment']['XDG_CACHE_HOME']}" in service["volumes"]
    # The volume belongs to the user that writes to it.
    before, _, after = (DEPLOY / "Dockerfile").read_text().partition("USER treering")
    assert "chown treering:treering /models" in before and "ENTRYPOINT" in after
    folders["cronjob"] = {entry["name"]: entry["value"] for entry in cronjob_container()["env"]}
    assert folders["cronjob"]["XDG_CACHE_HOME"].startswith(cronjob_container()["volumeMounts"][0]["mountPath"])
    for found in folders.values():
        monkeypatch.setenv("XDG_CACHE_HOME", found["XDG_CACHE_HOME"])
        assert cache_folder().is_relative_to(found["HF_HOME"])


def test_each_server_can_have_its_own_port() -> None:
    text = (DEPLOY / "systemd" / "treering-serve@.service").read_text()
    assert "EnvironmentFile=-/srv/treering/%i/" in text and "--port ${PORT}" in text


def test_the_dag_compiles() -> None:
    """Airflow is not installed: it is parsed, and its arguments are compared with those meant. It was not run."""
    tree = ast.parse((DEPLOY / "airflow" / "treering_dag.py").read_text())
    compile(tree, "treering_dag.py", "exec")
    imported = {f"{node.module}.{a.name}" for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert imported >= {"airflow.sdk.DAG", "airflow.providers.standard.operators.bash.BashOperator"}
    calls = {
        node.func.id: node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    given = {name: {keyword.arg: keyword.value for keyword in calls[name].keywords} for name in ("DAG", "BashOperator")}
    assert cron(ast.literal_eval(given["DAG"]["schedule"]))
    assert ast.literal_eval(given["DAG"]["max_active_runs"]) == 1
    assert {"task_id", "bash_command", "retries"} <= set(given["BashOperator"])


def test_the_page_names_every_file() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    for path in DEPLOY.rglob("*.*"):
        if path.is_file() and path.suffix != ".pyc":
            assert f"deploy/{path.relative_to(DEPLOY)}" in page, path
