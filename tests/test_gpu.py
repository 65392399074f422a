"""On a GPU, by `make gpu`: what it computes is what the processor does, to the same bits every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_serve_batch import read_all, take
from tests.training import Counted, Run, StopAt, same_bits, settings
from treering import Workspace, registry
from treering.data.example import Message
from treering.errors import UpdateInterruptedError
from treering.greedy import generate
from treering.model import encode_prompt
from treering.results import RESULTS, read_results
from treering.serve.batch import Batch, Row
from treering.testing import tiny_model, toy_rows

MakeWorkspace = Callable[..., Workspace]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]

LEARNS: dict[str, Any] = {"learning_rate": 1e-2, "num_train_epochs": 8.0, "per_device_train_batch_size": 8}


def command(*words: str, gpu: bool = True) -> dict[str, Any]:
    """What a command line prints, in a process of its own that sees the GPU or does not."""
    env = {**os.environ, **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    code = f"from treering.cli import run; raise SystemExit(run({list(words)!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def log(ws: Workspace) -> list[dict[str, float]]:
    return [json.loads(line) for line in (registry.get(ws).folder / "log.jsonl").read_text().splitlines()]


def test_a_stream_ends_as_on_the_processor(workspace: MakeWorkspace) -> None:
    """Losses, scores, answers and verdicts, with replay and stored logits, in float32."""
    ends = []
    for name, gpu in (("gpu", True), ("cpu", False)):
        ws = workspace(name, **LEARNS)
        for task in ("pens", "cups"):
            ws.ingest(toy_rows(task, 40), task=task)
            command("update", "--workspace", str(ws.root), "--json", gpu=gpu)
        assert (registry.get(ws).manifest["machine"]["device"] == "cpu") is not gpu
        results = {r.id: r.prediction for r in read_results(registry.get(ws).folder / RESULTS)}
        ends.append((registry.get(ws).name, registry.get(ws).scores, results, [entry["loss"] for entry in log(ws)]))
    (*gpu_end, gpu_losses), (*cpu_end, cpu_losses) = ends
    assert gpu_end == cpu_end
    assert cpu_end[1] == {"pens": 1.0, "cups": 1.0}
    # Ever smaller losses part ever more; how they begin is the same.
    assert gpu_losses == pytest.approx(cpu_losses, abs=0.1)
    assert gpu_losses[:4] == pytest.approx(cpu_losses[:4], rel=1e-3)


@pytest.mark.parametrize("half", [{}, {"bf16": True}, {"fp16": True}], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "kind",
    [{}, {"use_dora": True}, {"finetuning_type": "full", "learning_rate": 1e-3}, {"optim": "muon"}],
    ids=["lora", "dora", "full", "muon"],
)
def test_the_same_bits_whether_interrupted_or_not(tmp_path: Path, kind: dict[str, Any], half: dict[str, bool]) -> None:
    """On a model wide and deep enough for the kernels that real ones get."""
    folder = tiny_model(tmp_path / "model", hidden_size=256, layers=4)
    config = settings(folder, **{"learning_rate": 1e-2, **kind, **half}, max_steps=6, save_steps=2)
    whole = Run(folder, config)
    whole.train(checkpoints=tmp_path / "whole")
    looks = Counted()
    Run(folder, config).train(stop=looks)
    cut = Run(folder, config)
    with pytest.raises(UpdateInterruptedError):
        cut.train(checkpoints=tmp_path / "cut", stop=StopAt(looks.looks // 2))
    again = Run(folder, config)
    again.train(checkpoints=tmp_path / "cut")
    assert again.model.device.type == "cuda"
    assert same_bits(whole.weights(), again.weights())


def test_a_step_that_does_not_fit_is_taken_in_pieces(model_folder: Path, tmp_path: Path) -> None:
    """A real lack of memory: of the GPU's, all but a little is taken."""
    config = settings(model_folder, learning_rate=1e-2, max_steps=3, per_device_train_batch_size=24)
    plain = Run(model_folder, config)
    expected = plain.train()
    torch.cuda.reset_peak_memory_stats()
    Run(model_folder, config).train()
    peak = torch.cuda.max_memory_allocated()
    run = Run(model_folder, config)
    held = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held + 0.75 * (peak - held)) / total)
    try:
        found = run.train(checkpoints=tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert json.loads((tmp_path / "recovery.json").read_text())["splits"]
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-3)


def test_what_was_planned_is_what_it_takes(workspace: MakeWorkspace) -> None:
    ws = workspace(**LEARNS)
    ws.ingest(toy_rows("pens", 40), task="pens")
    planned = command("plan", "--workspace", str(ws.root), "--json")["estimate"]
    command("update", "--workspace", str(ws.root), "--json")
    cost = registry.get(ws).manifest["cost"]
    assert planned["steps"] == len(log(ws))
    assert planned["peak_gpu_memory_mb"] == pytest.approx(cost["peak_gpu_memory_mb"], rel=0.2)


def test_batches_of_the_server_write_what_generate_writes(model_folder: Path) -> None:
    run = Run(model_folder, settings(model_folder, learning_rate=1e-2, num_train_epochs=8.0))
    run.train()
    model = run.model.eval()
    turns = [[Message("user", row["text"])] for row in toy_rows("pens", 8)]
    written = generate(model, run.tokenizer, turns, [8] * 8, run.config)
    batch: Batch[list[int]] = Batch(model, None, 0)
    rows: list[Row[list[int]]] = [Row([], encode_prompt(run.tokenizer, turn)) for turn in turns]
    take(rows, read_all(batch, rows))
    for _ in range(7):
        take(*batch.step())
    end = run.tokenizer.eos_token_id
    assert [run.tokenizer.decode([*row.owner, end][: [*row.owner, end].index(end)]) for row in rows] == written


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits(model_folder: Path, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    config = settings(model_folder, quantization_bit=bits, learning_rate=1e-2, num_train_epochs=20.0)
    losses = [entry["loss"] for entry in Run(model_folder, config).train(checkpoints=tmp_path)]
    assert losses[-1] < losses[0] / 4
    again = Run(model_folder, config)
    assert [entry["loss"] for entry in again.train()] == losses
