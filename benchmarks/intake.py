"""How many rows a second are taken in, and how that goes as more are stored.

    python benchmarks/intake.py --data DIR [--rows 1000000] [--peer 50000] [--work DIR] [--json FILE]

Rows are made from the real text in `DIR` (a folder a task, as for `treering bench`): a question of it and some words,
in four shapes; five in a hundred are near duplicates of an earlier row. They come in ten files. Beside it, on the first
`--peer` rows: what one would do by hand, Hugging Face `datasets` with MinHash LSH of datasketch (`pip install
'treering[benchmarks]'`).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treering import Workspace
from treering.bench.stream import examples

FILES = 10
NEAR = 0.05
RECENT = 5000
"""Rows that near duplicates are made of."""


def rows(data: Path, count: int) -> Iterator[dict[str, Any]]:
    """`count` rows in four shapes in turn."""
    draw = random.Random(0)
    found = [(row.prompt[-1].content, row.answer) for row in examples(data, "train")]
    words = sorted({word for question, _ in found for word in re.findall(r"\w+", question)})
    recent: list[tuple[str, str]] = []
    for number in range(count):
        if recent and draw.random() < NEAR:
            question, answer = draw.choice(recent)
            question = f"please {question}"
        else:
            question, answer = draw.choice(found)
            question = f"{question} {' '.join(draw.choices(words, k=draw.randint(8, 20)))}"
            recent.append((question, answer))
            if len(recent) > RECENT:
                recent[draw.randrange(RECENT)] = recent.pop()
        yield (
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
            {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
            {"instruction": question, "input": "", "output": answer},
            {"prompt": question, "completion": answer},
        )[number % 4]


def written(data: Path, count: int, folder: Path) -> list[Path]:
    """The rows in files of one size."""
    files = []
    source = rows(data, count)
    for number in range(FILES):
        files.append(folder / f"part-{number}.jsonl")
        with files[-1].open("w", encoding="utf-8") as file:
            for _ in range(count // FILES):
                file.write(json.dumps(next(source)) + "\n")
    return files


def ours(files: list[Path], folder: Path) -> dict[str, Any]:
    """Take the files in, one after the other."""
    ws = Workspace.create(folder / "ws")
    ws.ingest([{"text": "warm", "label": "up"}], task="warm")  # Libraries are loaded once, whatever comes.
    curve, near = [], 0
    for file in files:
        started = time.perf_counter()
        done = ws.ingest(file, task="all")
        curve.append(round(done.rows / (time.perf_counter() - started)))
        near += done.near
        assert done.rows == done.accepted + done.duplicates + done.quarantined
        print(f"{file.name}: {curve[-1]} rows/s", flush=True)
    size = sum(path.stat().st_size for path in ws.root.rglob("*") if path.is_file() and "inbox" not in path.parts)
    return {
        "rows_per_second": curve,
        "near": near,
        "counts": ws.catalog.counts(),
        "catalog_mb": round(size / 1e6),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_memory_of_a_child_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }


def by_hand(files: list[Path], count: int) -> dict[str, Any]:
    """The same with `datasets` and datasketch: read, bring into one shape, drop exact and near duplicates."""
    from datasets import Dataset
    from datasketch import MinHash, MinHashLSH

    def texts() -> Iterator[dict[str, str]]:
        for file in files:
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                turns = row.get("messages") or row.get("conversations")
                if turns:
                    question, answer = (turn.get("content") or turn.get("value") for turn in turns)
                else:
                    question = row.get("instruction") or row["prompt"]
                    answer = row.get("output") or row["completion"]
                yield {"question": question, "answer": answer}

    def sign(row: dict[str, str]) -> dict[str, Any]:
        signature = MinHash(num_perm=64)
        signature.update_batch([word.encode() for word in set(re.findall(r"\w+", row["question"].lower()))])
        return {"signature": signature.hashvalues}

    started = time.perf_counter()
    data = Dataset.from_generator(texts).select(range(count)).map(sign)
    index, scheme, kept = MinHashLSH(threshold=0.8, num_perm=64), MinHash(num_perm=64).scheme, 0
    for number, row in enumerate(data):
        signature = MinHash(num_perm=64, hashvalues=row["signature"], scheme=scheme)
        if not index.query(signature):
            index.insert(str(number), signature)
            kept += 1
    return {"rows_per_second": round(count / (time.perf_counter() - started)), "kept": kept}


def main() -> None:
    """Print a line a file, then all figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--peer", type=int, default=50_000, help="rows of the comparison; 0: none")
    parser.add_argument("--work", type=Path, help="where the files go; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = given.work or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    files = written(given.data, given.rows, folder)
    found = {"rows": given.rows, "treering": ours(files, folder)}
    if given.peer:
        found["by_hand"] = by_hand(files, min(given.peer, given.rows))
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.work is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
