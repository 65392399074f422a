"""What `treering serve` does under load, beside what people serve such a model with today.

    pip install -e '.[benchmarks]'
    python benchmarks/serving.py [--seconds 20] [--rounds 3] [--clients 1 8 32] [--json FILE]

All servers run at once; those that are not asked are suspended. Every round asks all of them, at every number of
clients, and medians over the rounds are printed. The load comes from locust (`load.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil

from treering import Workspace, examples, registry
from treering.model import resolve

HERE = Path(__file__).parent
ANSWERS = {
    "treering": "current",
    "treering, mixed adapters": "v1,v2,v3",
    "transformers serve": "",
    "transformers serve, continuous batching": "",
    "one request at a time": "current",
}
"""What is measured, and the models that the clients name; the last three answer with the base model alone."""


QUIET, SWAPS = "swaps: none", "swaps: one a second"


class Server:
    """A server in a process of its own, suspended while it is not asked."""

    def __init__(self, name: str, command: Sequence[str], port: int, log: Path) -> None:
        self.name, self.port = name, port
        with log.open("wb") as output:
            self._process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        for path in ("/readyz", "/health", "/v1/models"):
            if self._answers(path):
                break
        else:
            raise SystemExit(f"{name} does not answer; see {log}")
        self._each("suspend")
        self.peak_mb = 0.0

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run; its memory is measured at the end."""
        self._each("resume")
        try:
            yield
            self.peak_mb = max(self.peak_mb, sum(p.memory_full_info().pss for p in self._tree()) / 2**20)
        finally:
            self._each("suspend")

    def end(self) -> None:
        """Kill it."""
        self._each("kill")

    def _tree(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    def _each(self, action: str) -> None:
        for process in reversed(self._tree()):
            getattr(process, action)()

    def _answers(self, path: str) -> bool:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5):
                    return True
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return False
            except OSError:
                if self._process.poll() is not None:
                    return False
            time.sleep(0.5)
        return False


def workspace(folder: Path) -> Workspace:
    """v1, v2 and v3: adapters of a few careful steps, which still answer at length."""
    ws = Workspace.create(
        folder,
        max_steps=2,
        learning_rate=1e-5,
        per_device_train_batch_size=4,
        protect=[],
        eval={"max_new_tokens": 2},
        serve={"max_batch_size": 32, "max_queue": 256},
    )
    for task in sorted(path.name for path in examples.path().iterdir() if path.is_dir())[:3]:
        rows = [json.loads(line) for line in (examples.path() / task / "train.jsonl").open()]
        ws.ingest(rows[:24], task=task)
        ws.update()
        ws.promote(registry.versions(ws)[-1].name, force=True)
    return ws


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_all(folder: Path, base: Path) -> Iterator[Server]:
    """The servers, one after the other."""
    treering = [sys.executable, "-c", "from treering.cli import main; main()", "serve", "-w", str(folder / "ws")]
    peer = [str(Path(sys.executable).parent / "transformers"), "serve", str(base), "--device", "cpu"]
    peer += ["--dtype", "bfloat16", "--host", "127.0.0.1"]
    port = free_port()
    yield Server("treering", [*treering, "--port", str(port)], port, folder / "treering.log")
    port = free_port()
    yield Server("transformers serve", [*peer, "--port", str(port)], port, folder / "transformers.log")
    port = free_port()
    batching = [*peer, "--continuous-batching", "--port", str(port)]
    yield Server("transformers serve, continuous batching", batching, port, folder / "batching.log")
    port = free_port()
    one = [sys.executable, str(HERE / "one_at_a_time.py"), str(base), str(port)]
    yield Server("one request at a time", one, port, folder / "one.log")


def load(server: Server, models: str, clients: int, seconds: int, tokenizer: Path) -> dict[str, float]:
    """Ask for so many seconds; tokens a second, and milliseconds of what matters."""
    command = [sys.executable, "-m", "locust", "-f", str(HERE / "load.py"), "--headless", "--json", "--skip-log"]
    command += ["--host", f"http://127.0.0.1:{server.port}", "--users", str(clients), "--spawn-rate", str(clients)]
    command += ["--run-time", f"{seconds}s", "--models", models, "--tokenizer", str(tokenizer)]
    with server.awake():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        time.sleep(2)  # The server sees that the clients have left.
    if not done.stdout.strip():
        raise SystemExit(f"locust failed:\n{done.stderr}")
    found = {entry["method"]: entry for entry in json.loads(done.stdout)}
    asked, text = found.get("POST", {}), found.get("text", {})
    return {
        "tokens_per_second": text.get("total_content_length", 0) / seconds,
        "answers": found.get("answer", {}).get("num_requests", 0),
        "failed": asked.get("num_failures", 0),
        "first_p50_ms": _quantile(found.get("first"), 0.5),
        "first_p99_ms": _quantile(found.get("first"), 0.99),
        "gap_p99_ms": _quantile(found.get("gap"), 0.99),
        "gap_max_ms": found.get("gap", {}).get("max_response_time") or 0.0,
        "answer_p99_ms": _quantile(found.get("answer"), 0.99),
    }


def _quantile(entry: dict[str, Any] | None, share: float) -> float:
    """From locust's histogram; not a number where nothing was counted."""
    counts = sorted((float(ms), count) for ms, count in (entry or {}).get("response_times", {}).items())
    left = share * sum(count for _, count in counts)
    for ms, count in counts:
        left -= count
        if left <= 0:
            return ms
    return float("nan")


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every figure."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


@contextmanager
def swapping(ws: Workspace) -> Iterator[None]:
    """Promote another version every second."""
    over = threading.Event()

    def swap() -> None:
        turn = 0
        while not over.wait(1.0):
            ws.promote(("v1", "v2")[turn % 2], force=True)
            turn += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Measure, print a table, and write the figures where wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    base = resolve(None)
    folder = Path(tempfile.mkdtemp(prefix="serving-"))
    ws = workspace(folder / "ws")
    servers: dict[str, Server] = {}
    runs: dict[str, list[dict[str, float]]] = {}
    try:
        for server in start_all(folder, base):
            servers[server.name] = server
            # The first answers are slow.
            load(server, ANSWERS[server.name] or str(base), 2, 8, base / "tokenizer.json")
        for number in range(options.rounds):
            for clients in options.clients:
                for name, models in ANSWERS.items():
                    server = servers[name.partition(", mixed")[0]]
                    found = load(server, models or str(base), clients, options.seconds, base / "tokenizer.json")
                    runs.setdefault(f"{name} | {clients}", []).append(found)
                    print(f"round {number + 1}, {clients} clients, {name}: {found}", file=sys.stderr, flush=True)
            # In pairs, and who begins changes: what else the machine does meets both.
            for name in (QUIET, SWAPS, SWAPS, QUIET):
                with swapping(ws) if name == SWAPS else nullcontext():
                    found = load(servers["treering"], "current", 8, options.seconds, base / "tokenizer.json")
                runs.setdefault(f"{name} | 8", []).append(found)
                print(f"round {number + 1}, {name}: {found}", file=sys.stderr, flush=True)
    finally:
        for server in servers.values():
            server.end()
    result = {
        "medians": {name: medians(found) for name, found in runs.items()},
        "peak_memory_mb": {name: round(server.peak_mb) for name, server in servers.items()},
        "runs": runs,
    }
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """For a page."""
    lines = [
        "| | clients | tokens/s (of all rounds) | first text p50 | p99 | gap p99 | gap max | answer p99 | failed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in result["medians"].items():
        speeds = [found["tokens_per_second"] for found in result["runs"][name]]
        cells = [f"{run['tokens_per_second']:.1f} ({min(speeds):.1f} to {max(speeds):.1f})"]
        cells += [f"{run[key]:.0f} ms" for key in ("first_p50_ms", "first_p99_ms", "gap_p99_ms", "gap_max_ms")]
        cells += [f"{run['answer_p99_ms'] / 1000:.1f} s", f"{run['failed']:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    pairs = list(zip(result["runs"][f"{QUIET} | 8"], result["runs"][f"{SWAPS} | 8"], strict=True))
    lines.append("")
    for key in ("gap_p99_ms", "gap_max_ms"):
        added = [swaps[key] - quiet[key] for quiet, swaps in pairs]
        lines.append(
            f"a swap a second adds to {key}: {statistics.median(added):.0f} ({min(added):.0f} to {max(added):.0f})"
        )
    lines += ["", *(f"{name}: {mb} MB" for name, mb in result["peak_memory_mb"].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
