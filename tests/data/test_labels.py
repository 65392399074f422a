"""Rules that see the labels of a whole task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from treering import Workspace
from treering.data import quarantine
from treering.data.example import Example
from treering.data.labels import Labels
from treering.errors import ConfigError


def row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows(answer: str, count: int, about: str = "") -> list[dict[str, Any]]:
    return [row(f"{about or answer} {chr(97 + n % 26) * (3 + n)}", answer) for n in range(count)]


def labels(**counts: int) -> Labels:
    return Labels.of([Example.of(one["messages"]) for said, n in counts.items() for one in rows(said, n)])


def test_a_rare_label_that_looks_like_a_frequent_one() -> None:
    assert labels(refund=30, refunds=1, delivery=30).slips() == {"refunds": "refund"}
    assert labels(refund=30, Refund=1, delivery=30).slips() == {"Refund": "refund"}
    assert labels(refund=30, refunds=20, delivery=30).slips() == {}
    assert labels(refund=30, warranty=1).slips() == {}


def test_open_answers_have_no_labels() -> None:
    found = Labels.of([Example.of(row(f"q{n}", f"answer {n}")["messages"]) for n in range(20)])
    assert found == Labels({}, {})
    assert (found.slips(), found.imbalance()) == ({}, None)


def test_out_of_balance() -> None:
    assert labels(refund=30, delivery=3).imbalance() == 10
    assert labels(refund=29, delivery=3).imbalance() is None


def test_new_rows_are_warned_of_beside_stored_ones(workspace: Callable[..., Workspace]) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest(rows("refund", 30) + rows("delivery", 30), task="support")
    found = ws.ingest(rows("Refunds", 1, "money back"), task="support")
    assert (found.accepted, found.warned) == (1, {"look-alike-label": 1})
    slip, ratio = found.notices
    assert slip == (
        "support: <python>, line 1: the rare label 'Refunds' looks like 'refund'; correct it if it is a slip"
    )
    assert ratio == "support: its most frequent label has 30 times as many rows as its rarest"
    assert ws.ingest(rows("delivery", 40, "parcel"), task="support").warned == {}  # What was told once is not new.


def test_at_other_levels(workspace: Callable[..., Workspace]) -> None:
    ws = workspace(checks={"look-alike-label": "reject", "imbalance": "off"})
    found = ws.ingest(rows("refund", 30) + rows("Refunds", 1, "money back") + rows("delivery", 30), task="support")
    assert (found.rows, found.accepted, found.quarantined) == (61, 60, 1)
    assert found.tasks == {"support": 60}
    assert found.reasons == {"look-alike-label": 1}
    assert found.notices == []
    assert found.refused[0]["line"] == 31
    refused = Example.of(rows("Refunds", 1, "money back")[0]["messages"]).id
    assert refused not in {*ws.catalog.train_ids("support"), *ws.catalog.held_out()["support"]}

    (kept,) = quarantine.listed(ws)
    assert quarantine.release(ws, [kept["number"]]).accepted == 1
    assert quarantine.listed(ws) == []

    ws = workspace("off", checks={"look-alike-label": "off", "imbalance": "off"})
    found = ws.ingest(rows("refund", 30) + rows("Refunds", 1, "money back"), task="support")
    assert (found.accepted, found.warned, found.notices) == (31, {}, [])


def test_levels_that_they_may_have(workspace: Callable[..., Workspace]) -> None:
    with pytest.raises(ConfigError, match="imbalance is reject; it may be warn, off"):
        workspace(checks={"imbalance": "reject"})
