"""One trainer of `treering bench speed`: trains so many steps a line on standard input, and tells of them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from treering import shares
from treering.batches import make_batch
from treering.config import Config
from treering.methods import Methods
from treering.methods.lora import adapter
from treering.model import Tokens, load_base, load_tokenizer, save_weights, shared_prefix
from treering.pipes import own_output
from treering.room import peak_gpu_memory_mb, peak_memory_mb
from treering.train import teach, train

Rows = list[list[Tokens]]


class Turns:
    """Counts steps, and waits after the last of a turn until the next one begins."""

    def __init__(self, out: Any, flops: Sequence[float] = ()) -> None:
        self._out = out
        self._flops = flops
        self._done = self._left = 0
        self._started = 0.0

    def begin(self) -> None:
        """Wait for a turn; the last has no steps."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self._left = int(line)
        self._started = time.perf_counter()

    def after_step(self, *_: Any) -> None:
        """A step is done."""
        self._done += 1
        if self._done < self._left:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        self.say(seconds=seconds, flops=sum(self._flops[: self._done]), peak_memory_mb=used_mb())
        self._flops, self._done = self._flops[self._done :], 0
        self.begin()

    def say(self, **told: Any) -> None:
        """Tell who holds the race."""
        self._out.write(json.dumps(told) + "\n")
        self._out.flush()


def used_mb() -> float:
    """The most memory that this process has held: the GPU's where it computes there."""
    return peak_gpu_memory_mb() or peak_memory_mb()


def ours(base: Path, config: Config, batches: Rows, out: Any, adapter: Path | None) -> None:
    """The loop that is measured here; what it learned goes to the folder `adapter`.

    With distillation among the methods every row has a teacher's stored logits, as replayed rows have.
    """
    tokenizer = load_tokenizer(base)
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    methods = Methods(config)
    torch.manual_seed(config.seed)
    model = methods.prepare(load_base(base, config), {})
    turns = methods.by_name["turns"] = Turns(out, list(_flops(model, batches, config, pad_id)))
    rows = {row.id: row for batch in batches for row in batch}
    teachers = None
    if "distill" in config.protect:
        teachers = teach(model, list(rows.values()), config, top_k=config.distill.top_k, pad_id=pad_id, quiet=True)
    steps = [[[row.id for row in batch]] for batch in batches]
    turns.begin()
    log = train(model, rows, steps, methods, config, pad_id=pad_id, teachers=teachers, quiet=True)
    if adapter is not None:
        adapter.mkdir(exist_ok=True)
        save_weights(model, tokenizer, adapter, str(base))
    turns.say(losses=[entry["loss"] for entry in log])


def _flops(model: Any, batches: Rows, config: Config, pad_id: int) -> Iterator[float]:
    """FLOPs of each step on tokens that are no padding, attention aside: forward, and gradients of what is between.

    A prefix that rows share is read once, and counts once.
    """
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name)
    parts = shares.count(config, model.device)
    for batch in batches:
        tokens = 0
        for part in shares.dealt(batch, parts):
            made = make_batch(part, pad_id)
            shared = shared_prefix(made.inputs["ids"], made.inputs["mask"], made.at)
            tokens += int(made.inputs["mask"].sum()) - shared * (len(part) - 1)
        yield 4.0 * body * tokens + 4.0 * head * sum(len(row.answers) for row in batch)


def peer(base: Path, config: Config, batches: Rows, out: Any, *, trl: bool, bf16: bool) -> None:
    """Transformers' `Trainer` or TRL's `SFTTrainer` around the same LoRA, on the same batches in the same order."""
    from transformers import AutoModelForCausalLM, TrainerCallback

    turns = Turns(out)

    class AfterStep(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.after_step()

    tokenizer: Any = load_tokenizer(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if bf16 else torch.float32)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "max_steps": len(batches),
        "train_sampling_strategy": "sequential",
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
        "dataloader_pin_memory": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        make = _sft_trainer if trl else _trainer
        trainer = make(model, tokenizer, {"output_dir": folder, **settings}, config, batches)
        trainer.add_callback(AfterStep())
        trainer.train()
    turns.say(losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def _trainer(model: Any, tokenizer: Any, settings: dict[str, Any], config: Config, batches: Rows) -> Any:
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    torch.manual_seed(config.seed)
    return Trainer(
        model=get_peft_model(model, adapter(config)),
        args=TrainingArguments(**settings),
        train_dataset=_labelled(batches),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def _sft_trainer(model: Any, tokenizer: Any, settings: dict[str, Any], config: Config, batches: Rows) -> Any:
    from datasets import Dataset
    from peft import get_peft_model
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
        for row in _labelled(batches)
    ]
    torch.manual_seed(config.seed)
    return SFTTrainer(
        model=get_peft_model(model, adapter(config)),
        # Checkpointing, which it does unless it is told not to, computes much twice and is for memory.
        args=SFTConfig(**settings, completion_only_loss=True, max_length=None, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def _labelled(batches: Rows) -> list[dict[str, list[int]]]:
    """Rows as trainers want them: labels of -100 where nothing is learned."""
    found = []
    for row in (row for batch in batches for row in batch):
        labels = [-100] * len(row.ids)
        for at in row.answers:
            labels[at] = row.ids[at]
        found.append({"input_ids": row.ids, "attention_mask": [1] * len(row.ids), "labels": labels})
    return found


def main(name: str, work: Path) -> None:
    """Run the contestant `name`, until standard input ends."""
    out = own_output()  # The pipe carries what `Turns` says alone.
    given = json.loads(work.read_text(encoding="utf-8"))
    batches = [[Tokens(row["id"], row["ids"], row["answers"]) for row in batch] for batch in given["batches"]]
    base, config = Path(given["base"]), Config.build(given["config"])
    if name == "treering":
        ours(base, config, batches, out, work.parent / "adapter")
    elif name == "distillation":
        ours(base, config.model_copy(update={"protect": ("distill",)}), batches, out, None)
    else:
        kind, _, precision = name.partition("-")
        peer(base, config, batches, out, trl=kind == "trl", bf16=precision == "bf16")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
