"""Write the longer streams of docs/benchmarks.md as folders for `treering bench quality --data`.

    python benchmarks/streams.py {clinc150,mixed-14,blurry,clinc-30} --clinc DIR [--longseq DIR] --out DIR

`--clinc` has a folder a domain of CLINC150, `--longseq` the folders agnews, dbpedia, sst2 and amazon, each with train
and test files. clinc150: a domain an update, in name order. mixed-14: the four others in between. blurry: the rows of
the ten domains over 30 small updates, each about one domain or two that fade into each other, and all of them return.
clinc-30: the labels of each domain as three tasks. The number that a training file ends in is its update.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from treering.bench.stream import examples
from treering.data.example import Example

OTHERS = ("agnews", "dbpedia", "sst2", "amazon")
UPDATES = 30
PARTS = 3
Tasks = dict[str, tuple[list[Example], list[Example]]]
"""Training and test rows by task."""
Stream = tuple[dict[str, dict[int, list[Example]]], dict[str, list[Example]]]
"""Training rows by task and update, and test rows by task."""


def read(folder: Path, names: Iterable[str] | None = None) -> Tasks:
    """The tasks in `folder`, all or those named."""
    wanted = sorted(path.name for path in folder.iterdir() if path.is_dir()) if names is None else list(names)
    return {name: (examples(folder / name, "train"), examples(folder / name, "held_out")) for name in wanted}


def clinc150(clinc: Tasks, _: Tasks) -> Stream:
    """A domain an update."""
    return _in_turn(clinc)


def mixed_14(clinc: Tasks, others: Tasks) -> Stream:
    """Domains with an unlike task after every second: two, one, two, one and so on."""
    names = list(clinc)
    for number, other in enumerate(others, start=1):
        names.insert(3 * number - 1, other)
    every = {**clinc, **others}
    return _in_turn({name: every[name] for name in names})


def clinc_30(clinc: Tasks, _: Tasks) -> Stream:
    """Each domain's labels in name order, cut into three tasks; all first parts come before the second ones."""
    found: Tasks = {}
    for part in range(PARTS):
        for name, (train, test) in clinc.items():
            labels = sorted({row.label for row in train})[part::PARTS]
            found[f"{name}-{'abc'[part]}"] = _with(train, labels), _with(test, labels)
    return _in_turn(found)


def blurry(clinc: Tasks, _: Tasks) -> Stream:
    """Every domain is at its height three times, and each time a part of its rows comes early or late.

    In a round, half of a domain's share comes in its own update and a quarter in each neighbouring one. What is asked
    drifts as well: half of a label's rows come in one of the three rounds, the others in any.
    """
    train: dict[str, dict[int, list[Example]]] = {name: {} for name in clinc}
    rounds = UPDATES // len(clinc)
    for place, (name, sides) in enumerate(clinc.items()):
        rows = sides[0]
        draw = random.Random(f"blurry:{name}")
        labels = sorted({row.label for row in rows})
        for row in rows:
            # The label leans to a round, so that what a domain asks for changes from one to the next.
            leaning = labels.index(row.label) * rounds // len(labels)
            turn = leaning if draw.random() < 0.5 else draw.randrange(rounds)
            update = turn * len(clinc) + place + draw.choice((-1, 0, 0, 1))
            train[name].setdefault(min(max(update, 0), UPDATES - 1) + 1, []).append(row)
    return train, {name: sides[1] for name, sides in clinc.items()}


STREAMS: dict[str, Callable[[Tasks, Tasks], Stream]] = {
    "clinc150": clinc150,
    "mixed-14": mixed_14,
    "blurry": blurry,
    "clinc-30": clinc_30,
}


def write(stream: Stream, out: Path) -> None:
    """A folder a task, a training file an update."""
    train, test = stream
    for task, updates in train.items():
        folder = out / task
        folder.mkdir(parents=True, exist_ok=True)
        for number, rows in updates.items():
            _file(folder / f"train-{number:02}.jsonl", rows)
        _file(folder / "test.jsonl", test[task])


def _in_turn(tasks: Tasks) -> Stream:
    train = {name: {number: rows} for number, (name, (rows, _)) in enumerate(tasks.items(), start=1)}
    return train, {name: test for name, (_, test) in tasks.items()}


def _with(rows: list[Example], labels: list[str]) -> list[Example]:
    return [row for row in rows if row.label in labels]


def _file(path: Path, rows: list[Example]) -> None:
    lines = (json.dumps({"messages": row.as_dicts()}, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write one stream."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stream", choices=STREAMS)
    parser.add_argument("--clinc", type=Path, required=True)
    parser.add_argument("--longseq", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.stream == "mixed-14" and given.longseq is None:
        raise SystemExit("mixed-14 needs --longseq DIR, with the folders " + ", ".join(OTHERS))
    if given.out.exists():
        raise SystemExit(f"--out {given.out} exists; name a new folder")
    others = read(given.longseq, OTHERS) if given.longseq else {}
    write(STREAMS[given.stream](read(given.clinc), others), given.out)


if __name__ == "__main__":
    main()
