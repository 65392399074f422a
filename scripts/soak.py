"""Run the long tests; what came of each goes to docs/soak.md, with date and commit."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "soak.md"
RESULTS = ROOT / ".soak.xml"
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def page(results: ElementTree.Element, when: str, commit: str) -> str:
    """The page, made of pytest's JUnit report; what a test records of itself are its key figures."""
    lines = [
        "# Long tests",
        "",
        f"`make soak`, {when}, commit {commit}.",
        "",
        "| test | outcome | minutes | figures |",
        "| --- | --- | --- | --- |",
    ]
    for case in results.iter("testcase"):
        outcome = next((OUTCOMES[part.tag] for part in case if part.tag in OUTCOMES), "passed")
        figures = "; ".join(f"{p.get('name')}: {p.get('value')}" for p in case.iter("property"))
        file = case.attrib["classname"].replace(".", "/")
        minutes = float(case.attrib["time"]) / 60
        lines.append(f"| `{file}.py::{case.attrib['name']}` | {outcome} | {minutes:.1f} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns pytest's exit code."""
    report = ["-o", "junit_family=xunit1", f"--junitxml={RESULTS}"]  # The other family has no room for figures.
    command = [sys.executable, "-m", "pytest", "-m", "soak", "--durations=0", *report]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    PAGE.write_text(
        page(ElementTree.parse(RESULTS).getroot(), f"{datetime.now(UTC):%Y-%m-%d}", commit), encoding="utf-8"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
