"""What fits: peak memory of a few training steps, by the size of the model and by what learns how.

    python benchmarks/memory.py [--sizes 135M,360M,1.7B] [--rows 8] [--length 512] [--json FILE]

The models have the shapes of the SmolLM2 family and random weights: memory does not depend on what they know.
Each figure is of a process of its own from start to end, libraries, loading and quantising included; on a GPU, of its
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9, "kv_heads": 3},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "heads": 15, "kv_heads": 5},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "heads": 32, "kv_heads": 32},
}

WAYS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "full, gradient checkpointing": {"finetuning_type": "full", "gradient_checkpointing": True},
    "LoRA": {},
    "LoRA, gradient checkpointing": {"gradient_checkpointing": True},
    "QLoRA, 8 bits": {"quantization_bit": 8},
    "QLoRA, 4 bits": {"quantization_bit": 4},
    "QLoRA, 4 bits, gradient checkpointing": {"quantization_bit": 4, "gradient_checkpointing": True},
}

STEPS = 2
"""The optimiser's state is there from the first; the second holds all there ever is."""
ANSWER = 32


def write_model(folder: Path, size: str) -> None:
    """A model of random weights and the default model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from treering.model import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve(None))
    tokenizer.save_pretrained(folder)
    shape = dict(SHAPES[size])
    heads, kv_heads = shape.pop("heads"), shape.pop("kv_heads")
    config = LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)


def train_a_little(folder: Path, way: str, rows: int, length: int) -> None:
    """Train, and print the peak of this process's memory in MB and the seconds of the last step.

    What needs more than there is fails by itself; the kernel would end whoever it likes.
    """
    import resource

    import torch

    from treering.bench.contestant import used_mb
    from treering.config import Config
    from treering.methods import Methods
    from treering.model import Tokens, load_base
    from treering.room import room
    from treering.train import train

    resource.setrlimit(resource.RLIMIT_DATA, (int(room(folder)["memory_mb"]) * 2**20, resource.RLIM_INFINITY))
    values = {"model_name_or_path": str(folder), "protect": [], "per_device_train_batch_size": rows}
    config = Config.build({**values, "max_steps": STEPS, **WAYS[way]})
    methods = Methods(config)
    torch.manual_seed(config.seed)
    model = methods.prepare(load_base(folder, config), {})
    draw = random.Random(0)
    made = {
        f"{step} {row}": [draw.randrange(10, 40_000) for _ in range(length)]
        for step in range(STEPS)
        for row in range(rows)
    }
    tokens = {id: Tokens(id, ids, list(range(length - ANSWER, length))) for id, ids in made.items()}
    steps = [[[f"{step} {row}" for row in range(rows)]] for step in range(STEPS)]
    log = train(model, tokens, steps, methods, config, pad_id=0, quiet=True)
    seconds = rows * (length - 1) / log[-1]["tokens_per_second"]
    print(json.dumps({"peak_memory_mb": used_mb(), "step_seconds": seconds}))


def run(words: list[str]) -> str:
    """Run this file in a process of its own; what it prints, or why it did not end."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, __file__, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        return json.dumps({"failed": last or f"exit code {done.returncode}"})
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Print a line a figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default=",".join(SHAPES))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, metavar=("FOLDER", "SIZE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write_model(Path(given.write[0]), given.write[1])
        print("{}")
        return
    if given.one:
        train_a_little(Path(given.one[0]), given.one[1], given.rows, given.length)
        return
    found: list[dict[str, Any]] = []
    for size in given.sizes.split(","):
        with tempfile.TemporaryDirectory(prefix="treering-memory-") as folder:
            run(["--write", folder, size])
            for way in WAYS:
                words = ["--one", folder, way, "--rows", str(given.rows), "--length", str(given.length)]
                found.append({"size": size, "way": way, **json.loads(run(words))})
                print(json.dumps(found[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
