"""Per-row results, and what they come to per task; kept without the rows' texts, which stay in the catalog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treering.data.example import Example
from treering.files import write_file
from treering.scoring import further

RESULTS, PARENT_RESULTS, BEST = "results.parquet", "parent.parquet", "best.parquet"
"""In the folder of a version: what it scored, its parent on the same rows, and what was best until then (`gate`)."""


@dataclass(frozen=True)
class Result:
    """One scored row. `loss` is the mean cross entropy of the answer's tokens, in nats.

    `of_base`: what answered was the base model, for the prompt is unlike all that was learned.
    """

    id: str
    task: str
    metric: str
    score: float
    loss: float
    prediction: str
    of_base: bool = False


def task_scores(results: Sequence[Result], examples: Mapping[str, Example] | None = None) -> dict[str, dict[str, Any]]:
    """Per task: `score` and `loss` (means), `rows` and `metric`; with the `examples` by id, `measures` (`further`)."""
    also = further(results, examples or {})
    tasks: dict[str, list[Result]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result)
    return {
        task: {
            "score": sum(r.score for r in found) / len(found),
            "loss": sum(r.loss for r in found) / len(found),
            "rows": len(found),
            "metric": found[0].metric,
            **({"measures": also[task]} if task in also else {}),
        }
        for task, found in tasks.items()
    }


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Keep per-row results as Parquet: ids and outcomes; the rows' texts stay in the catalog."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("id", "task", "metric", "score", "loss", "prediction", "of_base")
    table = pa.table({name: [asdict(result)[name] for result in results] for name in names})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_file(path, sink.getvalue().to_pybytes())


def read_results(path: Path) -> list[Result]:
    """What `write_results` kept."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        # Threads of pyarrow's own that cannot begin, for want of address space, would be waited for without end.
        return [Result(**row) for row in file.read(use_threads=False).to_pylist()]


def read_best(folder: Path) -> list[Result]:
    """What was best until the version in `folder`; where it kept none, what it scored itself."""
    return read_results(folder / (BEST if (folder / BEST).exists() else RESULTS))
