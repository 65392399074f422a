"""The loop: the right tokens, the same bits however often it is interrupted, the same gradients by every way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.training import Run, StopAt, chat, examples, same_bits, settings
from treering import shares
from treering import train as train_module
from treering.batches import Batch, Noise, make_batch
from treering.config import Config
from treering.data.example import Example
from treering.errors import ConfigError, UpdateInterruptedError
from treering.memory import Memory, Teacher
from treering.methods import Methods
from treering.model import Tokens, encode, encode_prompt, load_tokenizer, logits_at, with_prompts
from treering.passes import losses
from treering.schedule import passes, plan_steps, rate_schedule
from treering.stop import stop_on_signals
from treering.train import teach

RECORDED = [6.26756, 4.77819, 3.45686, 2.24950, 1.56761]
"""First five losses of `test_recorded_losses`, float32 on CPU."""


@pytest.mark.parametrize("values", [{}, {"use_dora": True, "additional_target": "lm_head"}], ids=["plain", "dora"])
def test_shares_of_a_batch_teach_what_the_whole_does(
    model_folder: Path, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """Every loss of a step, whatever computes its rows, and the same bits each time."""
    sizes_of_a_step = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 2.0}
    config = settings(model_folder, **sizes_of_a_step, **values)
    taught = Run(model_folder, config, mixed_lengths())
    rows = list(taught.rows.values())
    teachers = teach(taught.model, rows[:5], config, top_k=4, pad_id=taught.pad_id, quiet=True)
    parents = teach(taught.model, rows[5:], config, top_k=4, pad_id=taught.pad_id, quiet=True)
    sizes: set[int] = set()

    def noted(rows: Sequence[Tokens], *others: Any, **settings: Any) -> Batch:
        sizes.add(len(rows))
        return make_batch(rows, *others, **settings)

    monkeypatch.setattr(train_module, "make_batch", noted)

    def run(count: int) -> tuple[dict[str, Tensor], list[dict[str, float]], set[int]]:
        threads(count)
        sizes.clear()
        made = Run(model_folder, config.model_copy(update={"protect": ("distill", "lwf")}), mixed_lengths())
        log = made.train(teachers=teachers, parents=parents)
        return made.weights(), log, set(sizes)

    (whole, log, whole_sizes), (shared, shared_log, shared_sizes) = run(1), run(2)
    assert (whole_sizes, shared_sizes) == ({8}, {4})
    for name in ("loss", "distill", "lwf"):
        assert [e[name] for e in shared_log] == pytest.approx([e[name] for e in log], rel=1e-4, abs=1e-6)
        assert log[-1][name] > 0
    for name, weight in whole.items():
        torch.testing.assert_close(shared[name], weight, rtol=1e-3, atol=1e-4)
    assert same_bits(shared, run(2)[0])


def test_a_share_has_rows_enough(model_folder: Path, threads: Callable[[int], None]) -> None:
    threads(4)
    cpu = torch.device("cpu")
    sizes = {1: 1, 7: 1, 8: 2, 15: 3, 16: 4, 64: 4}
    for size, wanted in sizes.items():
        assert shares.count(settings(model_folder, per_device_train_batch_size=size), cpu) == wanted
    for values in ({"lora_dropout": 0.1}, {"finetuning_type": "full"}):
        assert shares.count(settings(model_folder, per_device_train_batch_size=64, **values), cpu) == 1
    assert shares.count(settings(model_folder, per_device_train_batch_size=64), torch.device("cuda")) == 1


def test_accumulation_equals_one_large_batch(model_folder: Path) -> None:
    def run(size: int, accumulate: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        values = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        made = Run(model_folder, settings(model_folder, **values), mixed_lengths())
        ids = list(made.rows)
        log = made.train(steps=[[ids[at : at + size] for at in range(0, 16, size)]] * 3)
        return made.weights(), log

    (whole, log), (parts, part_log) = run(16, 1), run(8, 2)
    assert [e["loss"] for e in part_log] == pytest.approx([e["loss"] for e in log], rel=1e-5)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-3, atol=1e-5)


def mixed_lengths() -> list[Example]:
    return [chat(("user", f"q{n} " * (1 + n % 5)), ("assistant", "yes " * (1 + n % 7) + str(n))) for n in range(16)]


def test_answers_decode_to_the_answers_and_their_end_marks(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    for example in [*examples(3), chat(("user", "héllo 🎉"), ("assistant", "«çà» 日本\n\n two lines"))]:
        tokens = encode(tokenizer, example)
        assert tokenizer.decode([tokens.ids[at] for at in tokens.answers]) == example.answer + "<|im_end|>"
        assert tokens.ids[: tokens.answers[0]] == encode_prompt(tokenizer, example.prompt)
        assert tokens.answers[-1] == len(tokens.ids) - 1


def test_every_assistant_turn_is_trained_and_the_last_is_scored(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    example = chat(("system", "s"), ("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two!"))
    trained, scored = encode(tokenizer, example), encode(tokenizer, example, last_only=True)
    assert tokenizer.decode([trained.ids[at] for at in trained.answers]) == "one<|im_end|>two!<|im_end|>"
    assert tokenizer.decode([scored.ids[at] for at in scored.answers]) == "two!<|im_end|>"
    assert trained.ids == scored.ids


def test_an_empty_answer_is_its_end_mark(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    tokens = encode(tokenizer, chat(("user", "say nothing"), ("assistant", "")))
    assert [tokens.ids[at] for at in tokens.answers] == [tokenizer.eos_token_id]


def test_a_greeting_is_read_but_not_learned(model_folder: Path) -> None:
    run = Run(model_folder, settings(model_folder))
    greeted = chat(("assistant", "welcome"), ("user", "hello"), ("assistant", "yes"))
    found = encode(run.tokenizer, greeted)
    assert "welcome" in run.tokenizer.decode(found.ids)
    assert "yes" in (said := run.tokenizer.decode([found.ids[at] for at in found.answers])) and "welcome" not in said


def test_a_turn_of_weight_0_is_read_but_not_learned(model_folder: Path) -> None:
    run = Run(model_folder, settings(model_folder))
    turns = chat(("user", "hello"), ("assistant", "welcome"), ("user", "again"), ("assistant", "yes")).as_dicts()
    found = encode(run.tokenizer, Example.of([turns[0], {**turns[1], "weight": 0}, *turns[2:]]))
    assert "welcome" in run.tokenizer.decode(found.ids)
    assert "yes" in (said := run.tokenizer.decode([found.ids[at] for at in found.answers])) and "welcome" not in said


def test_prompts_are_learned_besides_where_that_is_asked_for(model_folder: Path) -> None:
    """Every token but the first counts in the loss; what is scored, and where teachers stand, are the answers still."""
    run = Run(model_folder, settings(model_folder))
    plain = list(run.rows.values())[:3]
    rows = [with_prompts(row) for row in plain]
    assert [row.answers for row in rows] == [row.answers for row in plain]
    for row in rows:
        assert sorted([*row.answers, *row.prompts]) == list(range(1, len(row.ids)))
    batch = make_batch(rows, run.pad_id)
    logits = logits_at(run.model, **batch.inputs, at=batch.at)
    whole = cross_entropy(logits, batch.targets, reduction="sum")
    alone = [
        cross_entropy(run.model(torch.tensor([row.ids[:-1]])).logits[0], torch.tensor(row.ids[1:]), reduction="sum")
        for row in rows
    ]
    torch.testing.assert_close(whole, torch.stack(alone).sum(), rtol=1e-5, atol=1e-3)
    assert batch.of == sum(len(row.ids) - 1 for row in rows)
    assert losses(run.model, rows, run.config, run.pad_id) == losses(run.model, plain, run.config, run.pad_id)
    taught = teach(run.model, rows, run.config, top_k=2, pad_id=run.pad_id, quiet=True)
    teacher = make_batch(rows, run.pad_id, teachers=taught).teacher
    assert teacher is not None and teacher.of == sum(len(row.answers) for row in rows)
    assert batch.targets[teacher.at].tolist() == [row.ids[place] for row in rows for place in row.answers]


def test_only_answer_tokens_count(model_folder: Path) -> None:
    """The loss is the cross entropy of a plain forward pass over the answer tokens; prompt targets are not in it."""
    run = Run(model_folder, settings(model_folder))
    rows = list(run.rows.values())[:5]
    batch = make_batch(rows, run.pad_id)
    assert batch.targets.tolist() == [row.ids[at] for row in rows for at in row.answers]
    logits = logits_at(run.model, **batch.inputs, at=batch.at)
    wanted = torch.cat([run.model(torch.tensor([row.ids])).logits[0, [at - 1 for at in row.answers]] for row in rows])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    log = run.train(steps=[[[row.id for row in rows]]])
    assert log[0]["loss"] == pytest.approx(cross_entropy(wanted, batch.targets).item(), rel=1e-4)


@pytest.mark.parametrize("values", [{}, {"use_dora": True}, {"finetuning_type": "full"}], ids=["lora", "dora", "full"])
@pytest.mark.parametrize("count", [1, 2])
def test_layers_computed_again_teach_the_same(
    model_folder: Path, threads: Callable[[int], None], count: int, values: dict[str, Any]
) -> None:
    threads(count)
    rows = [chat(("system", "Sort these."), ("user", "x" * (1 + n)), ("assistant", f"{n}")) for n in range(8)]

    def run(again: bool) -> tuple[dict[str, Tensor], list[float], int]:
        made = Run(
            model_folder,
            settings(model_folder, gradient_checkpointing=again, per_device_train_batch_size=8, max_steps=3, **values),
            rows,
        )
        calls: list[int] = []
        made.model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        log = made.train()
        return made.weights(), [entry["loss"] for entry in log], len(calls)

    (kept, losses, calls), (again, again_losses, again_calls) = run(False), run(True)
    assert again_calls == 2 * calls
    assert again_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in kept.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-4, atol=1e-5)


def test_noise_is_as_large_as_the_row_is_short() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]])
    noise = Noise(alpha=5, seed=1).drawn(mask, 32)
    assert noise.shape == (2, 8, 32)
    for row, length in enumerate((8, 2)):
        bound = 5 / math.sqrt(length * 32)
        assert 0.9 * bound < noise[row].max() <= bound and -bound <= noise[row].min() < -0.9 * bound
        assert abs(noise[row].mean()) < 0.1 * bound
    assert torch.equal(noise, Noise(5, 1).drawn(mask, 32)) and not torch.equal(noise, Noise(5, 2).drawn(mask, 32))


@pytest.mark.parametrize("implementation", ["treering", "eager"])
def test_noise_is_added_to_the_embeddings(model_folder: Path, implementation: str) -> None:
    """Row by row what the model makes of embeddings plus noise, though all rows begin alike."""
    rows = [chat(("system", "Sort these."), ("user", "x" * (1 + 3 * n)), ("assistant", f"{n}")) for n in range(3)]
    run = Run(model_folder, settings(model_folder), rows)
    run.model.set_attn_implementation(implementation)
    batch = make_batch(list(run.rows.values()), run.pad_id)
    noise = Noise(5, seed=3)
    found = logits_at(run.model, **batch.inputs, at=batch.at, noise=noise)
    added = noise.drawn(batch.inputs["mask"], 64)
    wanted = []
    for row, tokens in enumerate(run.rows.values()):
        embedded = run.model.get_input_embeddings()(torch.tensor([tokens.ids[:-1]]))
        logits = run.model(inputs_embeds=embedded + added[row, : len(tokens.ids) - 1]).logits[0]
        wanted.append(logits[[at - 1 for at in tokens.answers]])
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits_at(run.model, **batch.inputs, at=batch.at), atol=0.1)


def test_noise_is_of_training_alone(model_folder: Path) -> None:
    """Every step, every batch and every seed has its own; the loss of a model that learns nothing shows it."""

    def losses(**values: Any) -> list[float]:
        run = Run(model_folder, settings(model_folder, learning_rate=1e-30, **values))
        first = list(run.rows)[:4]
        return [entry["loss"] for entry in run.train(steps=[[first, first]] * 3)]

    plain, noisy = losses(), losses(neftune_noise_alpha=5.0)
    assert len(set(plain)) == 1 and len(set(noisy)) == 3 and not set(noisy) & set(plain)
    assert losses(neftune_noise_alpha=5.0) == noisy != losses(neftune_noise_alpha=5.0, seed=1)


def test_a_model_without_gradient_checkpointing(model_folder: Path) -> None:
    run = Run(model_folder, settings(model_folder, gradient_checkpointing=True, finetuning_type="full"))
    run.model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"gradient_checkpointing is true, but Llama.* does not support"):
        run.train()


@pytest.mark.parametrize("padding", [0, 3])
def test_a_shared_prefix_changes_no_value(model_folder: Path, padding: int) -> None:
    config = settings(model_folder, finetuning_type="full")
    rows = [chat(("system", "Sort these."), ("user", "x" * (1 + padding * n)), ("assistant", f"{n}")) for n in range(4)]

    def gradients(implementation: str) -> tuple[Tensor, dict[str, Tensor], int]:
        run = Run(model_folder, config, rows)
        run.model.set_attn_implementation(implementation)
        batch = make_batch(list(run.rows.values()), run.pad_id)
        read: list[int] = []
        run.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
        logits = logits_at(run.model, **batch.inputs, at=batch.at)
        cross_entropy(logits, batch.targets).backward()
        return logits.detach(), {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}, sum(read)

    shared, shared_gradients, tokens = gradients("treering")
    whole, whole_gradients, all_tokens = gradients("eager")
    assert tokens < all_tokens - 3 * len("system Sort these.")
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)
    assert shared_gradients.keys() == whole_gradients.keys()
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_nothing_is_shared_into_an_answer(model_folder: Path) -> None:
    """Rows that are the same down to their answers share the prompt, never the answer's first prediction."""
    run = Run(model_folder, settings(model_folder))
    row = next(iter(run.rows.values()))
    batch = make_batch([row, row, row], run.pad_id)
    alone = logits_at(run.model, **make_batch([row], run.pad_id).inputs, at=batch.at[: len(row.answers)])
    torch.testing.assert_close(
        logits_at(run.model, **batch.inputs, at=batch.at), alone.repeat(3, 1), rtol=1e-4, atol=1e-5
    )


def test_the_rate_rises_and_falls() -> None:
    def rates(**values: Any) -> list[float]:
        return [rate_schedule(Config.build(values), 20)(step) for step in range(20)]

    constant = rates(lr_scheduler_type="constant", warmup_ratio=0.2)
    assert constant == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 17])
    linear = rates(lr_scheduler_type="linear", warmup_ratio=0.0)
    assert linear == pytest.approx([1 - step / 20 for step in range(20)])
    cosine = rates(lr_scheduler_type="cosine", warmup_ratio=0.1)
    assert cosine[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert cosine[11] == pytest.approx(0.5)
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert all(0 < rate <= 1 for rate in cosine)
    assert rate_schedule(Config(), 1)(0) == 1.0


def test_recorded_losses(model_folder: Path) -> None:
    """The first losses as they were when this test was written: a change of the loop that moves them is no accident."""
    config = settings(model_folder, num_train_epochs=3, per_device_train_batch_size=8, learning_rate=1e-2, seed=7)
    log = Run(model_folder, config).train()
    assert [entry["loss"] for entry in log[:5]] == pytest.approx(RECORDED, abs=1e-3)


def test_the_tiny_model_learns(model_folder: Path) -> None:
    config = settings(model_folder, num_train_epochs=10, learning_rate=1e-2)
    log = Run(model_folder, config).train()
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[0].keys() >= {"step", "loss", "lr", "tokens_per_second"}


def test_training_warns_of_nothing(tmp_path: Path, model_folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    config = settings(model_folder, max_steps=3)
    with pytest.raises(UpdateInterruptedError):
        Run(model_folder, config).train(checkpoints=tmp_path, stop=StopAt(1))
    Run(model_folder, config).train(checkpoints=tmp_path)
    assert [str(w.message) for w in recwarn if not issubclass(w.category, FutureWarning | DeprecationWarning)] == []


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"num_train_epochs": 1.0}, 6),
        ({"num_train_epochs": 3.0}, 18),
        ({"num_train_epochs": 0.5}, 3),
        ({"num_train_epochs": 1.5}, 9),
        ({"num_train_epochs": 0.01}, 1),
        ({"num_train_epochs": 0.5, "max_steps": 0}, 3),
        ({"max_steps": 1}, 1),
        ({"max_steps": 20}, 20),
        ({"num_train_epochs": 1.0, "gradient_accumulation_steps": 4}, 2),
    ],
)
def test_epochs_and_steps(model_folder: Path, values: dict[str, Any], steps: int) -> None:
    config = settings(model_folder, per_device_train_batch_size=4, **values)
    ids = [f"{n:02}" for n in range(24)]
    made = plan_steps(ids, Memory(), Methods(config), dict.fromkeys(ids, 5), config)
    assert len(made) == steps
    assert all(len(batch) <= 4 for step in made for batch in step)
    assert all(len(step) <= config.gradient_accumulation_steps for step in made)


@pytest.mark.parametrize(("rows", "count"), [(1, 20), (20, 20), (24, 17), (64, 7), (132, 4), (136, 3), (1000, 3)])
def test_few_rows_get_more_passes(model_folder: Path, rows: int, count: int) -> None:
    config = settings(model_folder, per_device_train_batch_size=4, num_train_epochs="auto")
    assert passes(config, rows) == count
    ids = [f"{n:04}" for n in range(rows)]
    assert len(plan_steps(ids, Memory(), Methods(config), dict.fromkeys(ids, 5), config)) == count * -(-rows // 4)


def test_an_epoch_shows_each_row_once_in_an_order_of_its_own(model_folder: Path) -> None:
    config = settings(model_folder, per_device_train_batch_size=4, num_train_epochs=2.0)
    ids = [f"{n:02}" for n in range(23)]
    lengths = {id: 5 + n % 3 for n, id in enumerate(ids)}
    made = plan_steps(ids, Memory(), Methods(config), lengths, config)
    epochs = [[id for step in made[at : at + 6] for batch in step for id in batch] for at in (0, 6)]
    assert [sorted(epoch) for epoch in epochs] == [ids, ids]
    assert epochs[0] != epochs[1]
    assert made == plan_steps(ids, Memory(), Methods(config), lengths, config)
    other = settings(model_folder, per_device_train_batch_size=4, num_train_epochs=2.0, seed=1)
    assert made != plan_steps(ids, Memory(), Methods(other), lengths, other)


def test_teachers_stand_at_their_own_tokens() -> None:
    def teacher(tokens: int, first: int) -> Teacher:
        ids = torch.arange(first, first + 2 * tokens, dtype=torch.int32).reshape(tokens, 2)
        return Teacher(ids, ids.half())

    rows = [Tokens("a", [1, 2, 3, 4], [2, 3]), Tokens("b", [1, 5, 6], [2]), Tokens("c", [1, 7, 8, 9], [1, 2, 3])]
    batch = make_batch(rows, 0, teachers={"b": teacher(1, 10), "c": teacher(3, 20)})
    assert batch.targets.tolist() == [3, 4, 6, 7, 8, 9]
    assert batch.teacher is not None
    assert (batch.of, batch.teacher.of) == (6, 4)
    assert batch.teacher.at.tolist() == [2, 3, 4, 5]
    assert batch.teacher.ids.tolist() == [[10, 11], [20, 21], [22, 23], [24, 25]]
    assert batch.teacher.logits.tolist() == batch.teacher.ids.tolist()
    assert make_batch(rows, 0).teacher is None
    # Logits stored for another tokenisation of the row are no teacher.
    assert make_batch(rows, 0, teachers={"a": teacher(5, 0)}).teacher is None


def test_teach_stores_the_top_logits(model_folder: Path) -> None:
    run = Run(model_folder, settings(model_folder, eval={"batch_size": 4}))
    rows = list(run.rows.values())
    found = teach(run.model, rows, run.config, top_k=3, pad_id=run.pad_id, quiet=True)
    assert found.keys() == run.rows.keys()
    with torch.no_grad():
        plain = run.model(torch.tensor([rows[0].ids])).logits[0, [at - 1 for at in rows[0].answers]].topk(3)
    stored = found[rows[0].id]
    assert (stored.ids.dtype, stored.logits.dtype) == (torch.int32, torch.float16)
    assert stored.ids.tolist() == plain.indices.tolist()
    torch.testing.assert_close(stored.logits.float(), plain.values, rtol=1e-2, atol=1e-2)


def test_a_signal_asks_and_a_second_one_ends() -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:  # noqa: PT012
        assert not stop.asked
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # Asked again, it is asked.
        assert stop.asked
        with pytest.raises(UpdateInterruptedError):
            stop.check()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_ends_at_once_what_is_not_patient() -> None:
    import signal

    def careless() -> None:
        with suppress(Exception):  # As around a library that raises what it likes.
            signal.raise_signal(signal.SIGTERM)

    with stop_on_signals() as stop, stop.at_once(), stop.patient():
        careless()
        assert stop.asked
    after = []
    with pytest.raises(UpdateInterruptedError), stop_on_signals() as stop, stop.at_once():  # noqa: PT012
        try:
            careless()
            after.append("went on")
        finally:
            careless()  # A second one does not end the cleaning up.
            after.append("cleaned up")
    assert after == ["cleaned up"]


def test_a_short_run_has_rates_too() -> None:
    schedule: Callable[[int], float] = rate_schedule(Config(warmup_ratio=0.99), 3)
    assert all(math.isfinite(schedule(step)) and schedule(step) > 0 for step in range(3))
