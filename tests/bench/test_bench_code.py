"""The digest of the code that a run depends on."""

from __future__ import annotations

import ast

from treering.bench import code
from treering.config import Config


def test_what_trains_is_in_it_and_what_serves_is_not() -> None:
    found = code.modules(code.START)
    wanted = {
        "candidate",
        "train",
        "schedule",
        "batches",
        "memory",
        "greedy",
        "passes",
        "rates",
        "checkpoints",
        "model",
    }
    assert {f"treering.{name}" for name in wanted} <= found
    assert not {name for name in found if name.startswith(("treering.serve", "treering.cli", "treering.bench"))}
    assert not {"treering.report", "treering.pipeline", "treering.config"} & found


def test_a_method_counts_where_it_is_used() -> None:
    bare, replay = (code.code_digest(Config.build({"protect": protect})) for protect in ([], ["replay"]))
    assert bare != replay == code.code_digest(Config.build({"protect": ["replay"], "learning_rate": 1}))


def test_words_do_not_count() -> None:
    one, other, another = (
        ast.dump(code._bare(ast.parse(text)))
        for text in (
            '"""Doc."""\ndef f():\n    """Says."""\n    return 1  # One.\n',
            "def f():\n    return 1\n",
            "def f():\n    return 2\n",
        )
    )
    assert one == other != another
