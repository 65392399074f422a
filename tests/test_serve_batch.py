"""Batches and adapters: whoever else is there, each sequence reads and writes what it would alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from treering.config import Config
from treering.errors import ModelError
from treering.model import load_base
from treering.serve import batch as batch_module
from treering.serve import cache as cache_module
from treering.serve import past
from treering.serve.adapters import Adapter, Slots, read_adapter
from treering.serve.batch import Batch, Row
from treering.serve.texts import Texts

PROMPTS = [list(b"a long prompt, of many bytes"), list(b"short"), list(b"of middle length"), list(b"x")]

PLAIN = Config(bf16=False)


@pytest.fixture
def model(model_folder: Path) -> Any:
    return load_base(model_folder, PLAIN).eval()


def peft_adapter(model_folder: Path, folder: Path, **settings: Any) -> Path:
    """A PEFT folder with random weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(sum(folder.name.encode()))
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(load_base(model_folder, PLAIN), LoraConfig(**settings))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(str(folder))
    return folder


def logits_of(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return cast(torch.Tensor, model(input_ids=torch.tensor([prompt])).logits[0, -1])


def read_all(batch: Batch[Any], rows: list[Row[Any]], tokens: int = 10_000) -> torch.Tensor:
    """Let `rows` join, and read their prompts to the end."""
    batch.join(rows)
    while (logits := batch.read(tokens)[1]) is None:
        pass
    return logits


def alone(model: Any, prompt: list[int], steps: int) -> list[int]:
    """The likeliest tokens, one after the other."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(logits_of(model, ids).argmax()))
    return ids[len(prompt) :]


def take(rows: list[Row[list[int]]], logits: torch.Tensor | None) -> None:
    """Write the likeliest token of each row into it, and into its owner."""
    assert logits is not None
    for row, scores in zip(rows, logits, strict=True):
        row.last = int(scores.argmax())
        row.owner.append(row.last)


# Adapters


def with_bias(folder: Path, model_folder: Path) -> Path:
    """The tiny model, with biases in its attention."""
    made = Path(shutil.copytree(model_folder, folder))
    config = made / "config.json"
    config.write_text(config.read_text().replace('"attention_bias": false', '"attention_bias": true'))
    weights = load_file(made / "model.safetensors")
    torch.manual_seed(0)
    for name in [name for name in weights if "self_attn" in name]:
        weights[name.replace("weight", "bias")] = torch.randn(len(weights[name])) / 4
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    return made


@pytest.mark.parametrize("kind", ["plain", "biased", "bf16", "fp16"])
def test_mixed_adapters_equal_peft_one_by_one(model_folder: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    base = with_bias(tmp_path / "biased", model_folder) if kind == "biased" else model_folder
    config = {"bf16": Config(bf16=True), "fp16": Config(fp16=True)}.get(kind, PLAIN)
    near: Any = {"atol": {"bf16": 0.25, "fp16": 0.03}.get(kind, 1e-4)}
    model = load_base(base, config).eval()
    assert model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    folders = [
        peft_adapter(base, tmp_path / "one"),
        peft_adapter(base, tmp_path / "two", r=8, lora_alpha=16, use_rslora=True),
        peft_adapter(base, tmp_path / "three", target_modules=["q_proj", "v_proj"]),
    ]
    slots = Slots(model, 3)
    for slot, folder in enumerate(folders, start=1):
        adapter = read_adapter(folder, model.dtype)
        assert adapter is not None
        slots.put(slot, adapter)
    batch: Batch[None] = Batch(model, slots, 0)
    logits = read_all(batch, [Row(None, prompt, slot) for slot, prompt in enumerate(PROMPTS)])
    bare = load_base(base, PLAIN)
    assert torch.allclose(logits[0], logits_of(bare, PROMPTS[0]), **near)
    for slot, folder in enumerate(folders, start=1):
        peft = PeftModel.from_pretrained(load_base(base, PLAIN), str(folder)).eval()
        for found in (logits[slot], only(model, slots, slot)):
            assert torch.allclose(found, logits_of(peft, PROMPTS[slot]), **near)
        assert not torch.allclose(logits[slot], logits_of(bare, PROMPTS[slot]), atol=0.5)
    slots.put(1, Adapter({}))  # An emptied slot is the base model again.
    assert torch.allclose(only(model, slots, 1), logits_of(bare, PROMPTS[1]), **near)


def only(model: Any, slots: Slots, slot: int) -> torch.Tensor:
    """What `slot` makes of its prompt with nobody beside it."""
    return read_all(Batch(model, slots, 0), [Row(None, PROMPTS[slot], slot)])[0]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}])
def test_more_than_plain_lora_is_left_to_peft(model_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert read_adapter(peft_adapter(model_folder, tmp_path / "a", **settings), torch.float32) is None


def test_an_adapter_of_another_model_is_refused(model: Any) -> None:
    slots = Slots(model, 1)
    wrong = torch.zeros(2, 3), torch.zeros(3, 2)
    for loaded in ({}, {"model.layers.0.self_attn.q_proj": (torch.zeros(2, 64), torch.zeros(64, 2))}):
        slots.put(1, Adapter(loaded))  # Whether or not the layers carry adapters already.
        with pytest.raises(ValueError, match="no linear layer"):
            slots.put(1, Adapter({"model.nowhere": wrong}))
        with pytest.raises(ValueError, match=r"do not fit .*q_proj, which makes 64 numbers of 64"):
            slots.put(1, Adapter({"model.layers.0.self_attn.q_proj": wrong}))


def test_an_adapter_of_no_numbers_reaches_no_batch(model_folder: Path, tmp_path: Path) -> None:
    folder = peft_adapter(model_folder, tmp_path / "a")
    weights = load_file(folder / "adapter_model.safetensors")
    weights[min(weights)][0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"not all finite in torch\.float32"):
        read_adapter(folder, torch.float32)


@pytest.mark.parametrize("slots", [[1], [1, 2]])
def test_small_adapters_are_not_lost_in_bfloat16(model_folder: Path, slots: list[int]) -> None:
    """What an adapter adds is rounded together with what the layer gives, not after it."""
    model: Any = load_base(model_folder, Config(bf16=True)).eval()
    layer = model.model.layers[0].self_attn.o_proj
    weight = layer.weight.detach().float()
    x = 100 * torch.randn(2000, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    a, b = torch.randn(4, 64).bfloat16(), torch.full((64, 4), 1e-4).bfloat16()
    adapters = Slots(model, 2)
    for slot in slots:
        adapters.put(slot, Adapter({"model.layers.0.self_attn.o_proj": (a, b)}))
    adapters.use([slots[at % len(slots)] for at in range(2000)])
    exact = x.float() @ a.float().T @ b.float().T
    with torch.inference_mode():
        changed = model.model.layers[0].self_attn.o_proj(x).float() - (x.float() @ weight.T).bfloat16().float()
    assert float((changed * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.1)


# Batches


def test_rows_that_join_and_leave_read_what_they_would_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SPARE", 3)
    batch: Batch[list[int]] = Batch(model, None, 0)
    written: list[list[int]] = [[] for _ in PROMPTS]
    rows = [Row(owner, prompt) for owner, prompt in zip(written, PROMPTS, strict=True)]
    take(rows[1:2], read_all(batch, rows[1:2]))
    take(*batch.step())
    take([rows[0], rows[3]], read_all(batch, [rows[0], rows[3]]))  # A longer prompt, and a shorter one.
    for _ in range(3):
        take(*batch.step())
    batch.leave(lambda row: row is rows[0])  # The longest goes; its columns go with it.
    assert batch._running is not None and batch._running.mask.shape[1] < len(PROMPTS[0])
    take([rows[2]], read_all(batch, [rows[2]], 5))
    for _ in range(3):
        take(*batch.step())
    batch.leave(lambda _: True)
    assert not batch.rows
    again = Row(written[0], [*PROMPTS[0], *written[0]])
    take([again], read_all(batch, [again]))
    assert [len(tokens) for tokens in written] == [5, 8, 4, 7]
    assert written == [alone(model, prompt, len(tokens)) for prompt, tokens in zip(PROMPTS, written, strict=True)]


def test_prompts_are_read_in_slices_between_steps(model: Any) -> None:
    batch: Batch[list[int]] = Batch(model, None, 0)
    first = Row[list[int]]([], PROMPTS[1])
    take([first], read_all(batch, [first]))
    pair = [Row[list[int]]([], PROMPTS[0]), Row[list[int]]([], PROMPTS[2])]
    batch.join(pair)
    batch.join([other := Row[list[int]]([], list(b"quite another one"))])
    turns = []
    while batch.reading:
        turns.append(batch.reading)
        rows, logits = batch.read(20)
        if logits is not None:
            take(rows, logits)
        take(*batch.step())
    assert turns == [pair, [other], pair, pair]  # Ten columns of two rows a slice; others have their turn.
    for row in (first, *pair, other):
        assert row.owner == alone(model, row.prompt, len(row.owner)) != []


@pytest.mark.parametrize("gone", [0, 1])
def test_rows_leave_while_their_prompts_are_read(model: Any, gone: int) -> None:
    for slices in (0, 1, 2):
        batch: Batch[list[int]] = Batch(model, None, 0)
        rows = [Row[list[int]]([], PROMPTS[0]), Row[list[int]]([], PROMPTS[1])]
        batch.join(rows)
        for _ in range(slices):
            batch.read(20)
        batch.leave(lambda row: row is rows[gone])  # noqa: B023
        stays = rows[1 - gone]
        assert batch.rows == [stays]
        while (found := batch.read(20))[1] is None:
            pass
        take(*found)
        take(*batch.step())
        assert stays.owner == alone(model, stays.prompt, 2)


@pytest.fixture
def slots(model: Any, model_folder: Path, tmp_path: Path) -> Slots:
    """One, with an adapter."""
    adapter = read_adapter(peft_adapter(model_folder, tmp_path / "one"), torch.float32)
    assert adapter is not None
    slots = Slots(model, 1)
    slots.put(1, adapter)
    return slots


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and columns of every pass."""
    read: list[tuple[int, ...]] = []
    forward = Batch._forward

    def noted(self: Batch[Any], part: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        read.append(tuple(ids.shape))
        return forward(self, part, ids, mask)

    monkeypatch.setattr(Batch, "_forward", noted)
    return read


def test_what_prompts_have_in_common_is_read_once(
    model: Any, slots: Slots, read: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch: Batch[list[int]] = Batch(model, slots, 0)
    rule = list(b"A rule for all. ")
    rows = [Row[list[int]]([], rule + list(text), 1) for text in (b"One", b"of two", b"of three", b"")]
    rows.append(Row([], rule + list(b"bare"), 0))
    take(rows[:1], read_all(batch, rows[:1]))
    take(*batch.step())
    take(rows[1:3], read_all(batch, rows[1:3]))
    take(rows[3:4], read_all(batch, rows[3:4]))
    take(rows[4:], read_all(batch, rows[4:]))  # What another adapter has read is of no use.
    take(*batch.step())
    assert read == [(1, 19), (1, 1), (2, len(b"of three")), (1, 1), (1, 20), (5, 1)]
    monkeypatch.undo()
    for row in rows:
        ids = list(row.prompt)
        for _ in row.owner:
            ids.append(int(read_all(Batch(model, slots, 0), [Row(None, ids, row.slot)])[0].argmax()))
        assert row.owner == ids[len(row.prompt) :]


def test_a_conversation_goes_on_where_it_ended(
    model: Any, slots: Slots, read: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(past, "LIMIT", 24)
    batch: Batch[list[int]] = Batch(model, slots, 0)

    def turn(prompt: list[int], slot: int) -> Row[list[int]]:
        """Three tokens; the row leaves with the last of them unread."""
        row = Row[list[int]]([], prompt, slot)
        expected = batch.unread(row)
        take([row], read_all(batch, [row]))
        assert read.pop() == (1, expected)
        for _ in range(2):
            take(*batch.step())
        batch.leave(lambda _: True)
        return row

    def unread(text: bytes, slot: int = 1) -> int:
        return batch.unread(Row([], list(text), slot))

    first = turn(list(b"Hello!"), 1)
    asked = [*first.prompt, *first.owner, *b" And?"]
    assert batch.unread(Row([], asked, 1)) == 6  # The last token of the answer, and the question.
    answer = turn(asked, 1).owner
    ids = list(asked)
    for _ in answer:
        ids.append(int(read_all(Batch(model, slots, 0), [Row(None, ids, 1)])[0].argmax()))
    assert answer == ids[len(asked) :]
    assert unread(b"Hello!") == 1 and unread(b"Hello!", slot=0) == 6
    assert len(list(batch._past)) == 1  # The second turn holds the first.
    turn(list(b"Bye"), 0)
    assert (unread(b"Hello!"), unread(b"Bye!", slot=0)) == (1, 1)
    turn(list(b"See you"), 0)  # There is no room for all three.
    assert (unread(b"Hello!"), unread(b"Bye!", slot=0), unread(b"See you!", slot=0)) == (6, 1, 1)
    assert batch.forget(0) and not batch.forget() and unread(b"Bye!", slot=0) == 4
    turn(list(b"A text that is longer than all that is kept"), 1)
    assert unread(b"A text that is longer than all that is kept, again") == 50


def test_what_failed_may_be_tried_again(model: Any) -> None:
    batch: Batch[list[int]] = Batch(model, None, 0)
    rows = [Row[list[int]]([], PROMPTS[0]), Row[list[int]]([], PROMPTS[1])]
    take(rows[:1], read_all(batch, rows[:1]))
    fails = True

    def fail(*_: Any) -> None:
        if fails:
            raise RuntimeError("no memory")

    model.model.layers[1].register_forward_pre_hook(fail)  # By then the first layer has its keys and values.
    acts: list[Callable[[], Any]] = [batch.step, lambda: batch.read(3), lambda: batch.read(3)]
    for act in acts:
        if act is acts[1]:
            batch.join(rows[1:])
        fails = True
        with pytest.raises(RuntimeError):
            act()
        fails = False
        found = act()
        if found[1] is not None:
            take(*found)
    take(*batch.step())
    for row in rows:
        assert row.owner == alone(model, row.prompt, len(row.owner)) != []


def test_rows_that_find_no_memory_to_run_are_not_lost(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the caches of those who run and of those who come do not fit side by side."""
    batch: Batch[list[int]] = Batch(model, None, 0)
    rows = [Row[list[int]]([], PROMPTS[0]), Row[list[int]]([], PROMPTS[2])]
    take(rows[:1], read_all(batch, rows[:1]))
    batch.join(rows[1:])
    batch.read(9)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "_below", full)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                batch.read(9)
    assert batch.reading == rows[1:] and batch.running == rows[:1]
    take(*batch.step())
    take(*batch.read(9))
    take(*batch.step())
    for row in rows:
        assert row.owner == alone(model, row.prompt, len(row.owner)) != []


def test_an_answer_ends_though_there_is_no_memory_to_keep_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch: Batch[list[int]] = Batch(model, None, 0)
    rows = [Row[list[int]]([], prompt) for prompt in PROMPTS[:2]]
    take(rows, read_all(batch, rows))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(past.Past, "add", full)
        batch.leave(lambda row: row is rows[0])
    assert batch.running == rows[1:] and batch.unread(Row([], PROMPTS[0])) == len(PROMPTS[0])
    batch.leave(lambda row: row is rows[1], keep=False)
    assert batch.unread(Row([], PROMPTS[1])) == len(PROMPTS[1])


def test_another_kind_of_cache_is_refused(model: Any) -> None:
    model.config.sliding_window = 4
    model.config.layer_types = ["sliding_attention"] * 2
    with pytest.raises(ModelError, match=r"keeps DynamicSlidingWindowLayer .* set model_name_or_path"):
        Batch(model, None, 0)


@pytest.mark.parametrize("tokens", [12, 10_000])
def test_embeddings_depend_neither_on_their_neighbours_nor_on_slices(model: Any, tokens: int) -> None:
    batch: Batch[None] = Batch(model, None, 0)
    *waits, together = batch.embed(PROMPTS, 0, tokens)
    assert waits == [None] * (9 if tokens == 12 else 0) and together is not None
    assert torch.allclose(together.norm(dim=1), torch.ones(4))
    for vector, prompt in zip(together, PROMPTS, strict=True):
        with torch.inference_mode():
            hidden = model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, hidden / hidden.norm(), atol=1e-5)


def test_texts_begin_again_once_the_past_has_made_room(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch: Batch[None] = Batch(model, None, 0)
    row: Row[None] = Row(None, PROMPTS[0])
    read_all(batch, [row])
    batch.leave(lambda _: True)
    texts = Texts("one", "base", PROMPTS)
    home = cast(Any, SimpleNamespace(batch=batch, slot=0))
    decoder = model.get_decoder()

    def full(*args: Any, **kwargs: Any) -> Any:
        if batch.unread(Row(None, PROMPTS[0])) < len(PROMPTS[0]) and texts.begun:
            raise torch.OutOfMemoryError
        return decoder(*args, **kwargs)

    monkeypatch.setattr(model, "get_decoder", lambda: full)
    events = [event for _ in range(40) if not texts.done for event in texts.go_on(home, 12)]
    expected = next(Batch(model, None, 0).embed(PROMPTS, 0, 10_000))
    assert expected is not None and sorted(event["at"] for event in events) == [0, 1, 2, 3]
    for event in events:
        assert torch.allclose(torch.tensor(event["vector"]), expected[event["at"]], atol=1e-5)
