"""Memory that runs out and losses that run away: training goes on, says so, and ends in the same bits if killed."""

from __future__ import annotations

import gc
import itertools
import json
import math
import random
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import Counted, KillAt, KilledError, Run, StopAt, chat, examples, same_bits, settings
from treering import optimizers, shares
from treering import train as loop
from treering.checkpoints import Checkpoints
from treering.errors import TreeringError, UpdateInterruptedError, no_memory
from treering.model import logits_at
from treering.optimizers import OPTIMIZERS
from treering.recovery import MOST_ROWS, WHAT, HalfStepError, LossError, Recovery, check_loss, worst

NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 123456789 bytes. Error code 12 (Cannot allocate memory)"
)
"""What torch says on a CPU."""

RATE = 1e-3


def recorded(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads((folder / "recovery.json").read_text())
    return found


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Passes over more tokens than that, padding included, find no memory. A stand-in for the allocator's own error."""

    def limit(tokens: int) -> None:
        def forward(model: Any, ids: Tensor, mask: Tensor, at: Tensor, **others: Any) -> Tensor:
            torch.rand(1)  # As dropout would.
            if ids.numel() > tokens:
                raise RuntimeError(NO_MEMORY)
            return logits_at(model, ids, mask, at, **others)

        monkeypatch.setattr(loop, "logits_at", forward)

    return limit


@pytest.fixture
def too_fast(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """The loss of a step is NaN if the one before was at a higher rate than that. A stand-in for real divergence."""

    def limit(step: int, rate: float) -> None:
        def check(entry: Mapping[str, float], log: Sequence[Mapping[str, float]], vocabulary: int) -> None:
            if entry["step"] == step and log and log[-1]["lr"] > rate:
                entry = {**entry, "loss": math.nan}
            check_loss(entry, log, vocabulary)

        monkeypatch.setattr(loop, "check_loss", check)

    return limit


def constant(folder: Path, **values: Any) -> Any:
    rate = {"learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    return settings(folder, **{**rate, "per_device_train_batch_size": 4, "num_train_epochs": 2.0, **values})


def growing() -> list[Any]:
    """Rows of which the later ones are longer."""
    return [chat(("user", "x" * (5 + 3 * number)), ("assistant", f"{number}")) for number in range(16)]


def test_memory_that_runs_out_changes_nothing_but_rounding(
    tmp_path: Path, model_folder: Path, little_memory: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = constant(model_folder)
    whole = Run(model_folder, config, growing())
    log = whole.train()
    widest = max(len(row.ids) for row in whole.rows.values()) - 1
    little_memory(2 * widest)
    halved = Run(model_folder, config, growing())
    halved_log = halved.train(checkpoints=tmp_path)
    found = recorded(tmp_path)["splits"]
    assert [split["pieces"] for split in found] == [2]
    step = found[0]["step"]
    assert f"out of memory at step {step} ([enforce fail" in found[0]["reason"]
    assert f"out of memory at step {step}" in (said := capsys.readouterr().err) and "in 2 pieces" in said
    assert [e["loss"] for e in halved_log] == pytest.approx([e["loss"] for e in log], rel=1e-4)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(halved.weights()[name], weight, rtol=1e-3, atol=1e-4)


def test_it_is_halved_until_it_fits(
    tmp_path: Path,
    model_folder: Path,
    little_memory: Callable[[int], None],
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With threads and accumulation too; not a row is left out or seen twice."""
    threads(2)
    monkeypatch.setattr(shares, "LEAST_ROWS", 2)
    config = constant(model_folder, gradient_accumulation_steps=2, num_train_epochs=1.0)
    run = Run(model_folder, config, growing())
    little_memory(max(len(row.ids) for row in run.rows.values()) - 1)
    log = run.train(checkpoints=tmp_path)
    assert len(log) == len(run.steps)
    # In two threads from the start, so that two pieces are rows alone.
    assert [split["pieces"] for split in recorded(tmp_path)["splits"]] == [2]
    whole = Run(model_folder, config, growing())
    monkeypatch.setattr(loop, "logits_at", logits_at)
    assert [e["loss"] for e in whole.train()] == pytest.approx([e["loss"] for e in log], rel=1e-4)


def long_rows(folder: Path, rows: int = 16) -> Run:
    """Three steps of 16 rows, which take 300 MB; one of 4 takes 100 MB."""
    texts = [chat(("user", chr(97 + n) + "x" * 500), ("assistant", str(n))) for n in range(rows)]
    return Run(folder, settings(folder, max_steps=3, per_device_train_batch_size=16), texts)


@pytest.mark.parametrize("part", [0.1, 0.3, 0.45, 0.7])
def test_a_pass_that_failed_holds_no_memory(model_folder: Path, part: float) -> None:
    """However far it came, forward or backward."""
    run, counted = long_rows(model_folder, rows=2), Counted()
    run.train(steps=run.steps[:1], stop=counted)

    def tensors() -> int:
        gc.collect()
        return sum(one.numel() for one in gc.get_objects() if isinstance(one, Tensor))

    before = tensors()
    stop = StopAt(int(part * counted.looks))
    with pytest.raises(UpdateInterruptedError):
        run.train(steps=run.steps[:1], stop=stop)
    # A group of layers may keep its last input and outputs, until the next pass.
    run.train(steps=run.steps[:1])
    assert tensors() <= before


def test_no_memory_for_one_row(tmp_path: Path, model_folder: Path, little_memory: Callable[[int], None]) -> None:
    little_memory(5)
    with pytest.raises(TreeringError, match=r"out of memory at step 1 .* one row at a time\. Lower cutoff_len"):
        Run(model_folder, constant(model_folder)).train(checkpoints=tmp_path)
    assert [split["pieces"] for split in recorded(tmp_path)["splits"]] == [2, 4]


class Short:
    """An optimiser whose steps numbered `fails` (from 1 on) find no memory in their midst.

    At the `state`-th tensor that is made for its state, or with 0 at the end, when all weights have changed.
    """

    def __init__(self, optimizer: Any, fails: set[int], state: int = 0) -> None:
        self._optimizer, self._fails, self._state, self.steps = optimizer, fails, state, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        self.steps += 1
        if self.steps not in self._fails:
            self._optimizer.step()
            return
        made, zeros_like = 0, torch.zeros_like

        def short(*args: Any, **options: Any) -> Tensor:
            nonlocal made
            made += 1
            if made == self._state:
                raise RuntimeError(NO_MEMORY)
            return zeros_like(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "zeros_like", short)
            self._optimizer.step()
        raise RuntimeError(NO_MEMORY)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Short]]:
    """Optimisers are `Short` from then on; returns those that were made."""
    make = optimizers.optimizer

    def limit(fails: set[int], state: int = 0) -> list[Short]:
        made: list[Short] = []

        def shortened(*args: Any) -> Short:
            made.append(Short(make(*args), fails, state))
            return made[-1]

        monkeypatch.setattr(optimizers, "optimizer", shortened)
        return made

    return limit


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("fails", "state"), [(1, 3), (1, 0), (5, 0)], ids=["state", "first step", "later step"])
def test_a_step_that_was_half_taken_is_undone(
    tmp_path: Path,
    model_folder: Path,
    short_steps: Callable[..., list[Short]],
    capsys: pytest.CaptureFixture[str],
    name: str,
    fails: int,
    state: int,
) -> None:
    """To the bits of a run that split the same steps with memory enough."""
    values = {"optim": name, "save_steps": 3, "max_steps": 7, "lora_dropout": 0.2, "lora_rank": 64, "use_dora": True}

    def run() -> Run:
        return Run(model_folder, constant(model_folder, **values))

    made = short_steps({fails}, state)
    short = run()
    log = short.train(checkpoints=tmp_path / "short")
    # Where it failed, and from the checkpoint before it on: that of the beginning, or of step 3.
    assert made[0].steps == len(log) + (1 if fails == 1 else 2)
    found = recorded(tmp_path / "short")["splits"]
    assert [(split["step"], split["pieces"]) for split in found] == [(fails, 2)]
    reason = f"out of memory at step {fails} (while the weights were changed: [enforce fail"
    assert reason in found[0]["reason"] and reason in capsys.readouterr().err
    short_steps(set())
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "recovery.json").write_text((tmp_path / "short" / "recovery.json").read_text())
    whole = run()
    assert [e["loss"] for e in whole.train(checkpoints=tmp_path / "whole")] == [e["loss"] for e in log]
    assert same_bits(whole.weights(), short.weights())
    assert capsys.readouterr().err == ""


def test_after_the_step_as_well(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method does to the weights is undone with the step."""
    config = constant(model_folder)
    plain, short = Run(model_folder, config), Run(model_folder, config)
    calls = 0

    def after_step(model: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
                weight.data.fill_(0)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(short.methods, "after_step", after_step)
    short.train(checkpoints=tmp_path)
    split = recorded(tmp_path)["splits"][0]
    assert split["step"] == 4 and "while the weights were changed: CUDA out of memory" in split["reason"]
    plain.train()
    for name, weight in plain.weights().items():
        torch.testing.assert_close(short.weights()[name], weight, rtol=1e-3, atol=1e-4)


def test_what_finds_no_memory_in_any_pieces(
    tmp_path: Path, model_folder: Path, short_steps: Callable[..., list[Short]]
) -> None:
    """It ends with the ways out, and goes on from the last checkpoint when there is memory."""
    config = constant(model_folder, save_steps=3)
    short_steps(set(range(4, 99)))
    with pytest.raises(TreeringError, match=r"out of memory at step 4 \(while the weights .* one row .* adamw_8bit"):
        Run(model_folder, config).train(checkpoints=tmp_path)
    assert [split["pieces"] for split in recorded(tmp_path)["splits"]] == [2, 4]
    assert (tmp_path / "step-3").exists()
    short_steps(set())
    resumed, plain = Run(model_folder, config), Run(model_folder, config)
    log = resumed.train(checkpoints=tmp_path)
    assert [entry["loss"] for entry in log] == pytest.approx([e["loss"] for e in plain.train()], rel=1e-4)


def test_with_no_checkpoint_to_go_back_to(model_folder: Path, short_steps: Callable[..., list[Short]]) -> None:
    short_steps({2})
    with pytest.raises(HalfStepError, match=r"out of memory at step 2 .* no checkpoint to go back to\. Set optim"):
        Run(model_folder, constant(model_folder)).train()


@pytest.mark.parametrize("fails", [1, 8])
def test_killed_between_the_record_and_the_undoing(
    tmp_path: Path,
    model_folder: Path,
    short_steps: Callable[..., list[Short]],
    monkeypatch: pytest.MonkeyPatch,
    fails: int,
) -> None:
    def run() -> Run:
        return Run(model_folder, constant(model_folder, save_steps=3))

    short_steps({fails})
    whole = run()
    whole.train(checkpoints=tmp_path / "whole")
    resume = Checkpoints.resume

    def dies(self: Checkpoints) -> Any:
        if (tmp_path / "killed" / "recovery.json").exists():
            raise KilledError
        return resume(self)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "resume", dies)
        with pytest.raises(KilledError):
            run().train(checkpoints=tmp_path / "killed")
    short_steps(set())
    last = run()
    last.train(checkpoints=tmp_path / "killed")
    assert recorded(tmp_path / "killed") == recorded(tmp_path / "whole")
    assert same_bits(whole.weights(), last.weights())


def test_what_is_no_memory() -> None:
    for error in (RuntimeError(NO_MEMORY), torch.OutOfMemoryError("CUDA out of memory."), MemoryError()):
        assert no_memory(error)
    assert no_memory(RuntimeError("std::bad_alloc"))
    assert not no_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_other_errors_are_not_survived(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "logits_at", forward)
    with pytest.raises(RuntimeError, match="a bug"):
        Run(model_folder, constant(model_folder)).train()


def test_a_lower_rate_from_the_last_good_checkpoint(
    tmp_path: Path, model_folder: Path, too_fast: Callable[[int, float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first retry goes to the newest checkpoint by count, the next, as that did not help, to the beginning."""
    too_fast(8, 0.3 * RATE)
    config = constant(model_folder, save_steps=3, save_minutes=1e-9)
    log = Run(model_folder, config).train(checkpoints=tmp_path)
    found = recorded(tmp_path)["retries"]
    assert [(retry["step"], retry["back_to"]) for retry in found] == [(8, 6), (8, 0)]
    assert all("loss is nan" in retry["reason"] for retry in found)
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert [entry["lr"] for entry in log] == pytest.approx([RATE / 4] * 12)
    said = capsys.readouterr().err
    assert "loss is nan at step 8; going back to step 6, with 0.5 of the learning rate" in said
    assert "going back to step 0, with 0.25" in said
    choices = Recovery(tmp_path).choices(RATE)
    assert choices["learning_rate of retry 2"]["value"] == RATE / 4
    assert "from step 0 again" in choices["learning_rate of retry 2"]["reason"]


def test_what_went_before_the_retry_stays(
    tmp_path: Path, model_folder: Path, too_fast: Callable[[int, float], None]
) -> None:
    config = constant(model_folder, save_steps=3)
    whole = Run(model_folder, config).train()
    too_fast(8, 0.6 * RATE)
    log = Run(model_folder, config).train(checkpoints=tmp_path)
    assert [e["loss"] for e in log[:7]] == [e["loss"] for e in whole[:7]]
    assert log[8]["loss"] != whole[8]["loss"]
    assert [e["lr"] for e in log] == pytest.approx([RATE] * 6 + [RATE / 2] * 6)


def test_a_failure_right_after_a_checkpoint(
    tmp_path: Path, model_folder: Path, too_fast: Callable[[int, float], None]
) -> None:
    """From there nothing could be taken otherwise; the one before is still there."""
    too_fast(7, 0.6 * RATE)
    Run(model_folder, constant(model_folder, save_steps=3)).train(checkpoints=tmp_path)
    assert [retry["back_to"] for retry in recorded(tmp_path)["retries"]] == [3]


def test_no_way_back_to_what_the_clock_made(
    tmp_path: Path, model_folder: Path, too_fast: Callable[[int, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Had the machine been slower, it would not be there."""
    monkeypatch.setattr(Checkpoints, "due", lambda self, step: step in (3, 6, 7))
    too_fast(9, 0.6 * RATE)
    Run(model_folder, constant(model_folder, save_steps=3)).train(checkpoints=tmp_path)
    assert [retry["back_to"] for retry in recorded(tmp_path)["retries"]] == [6]


def test_it_ends_with_the_rows_once_the_retries_are_used_up(
    tmp_path: Path, model_folder: Path, too_fast: Callable[[int, float], None]
) -> None:
    too_fast(8, 0.0)
    config = constant(model_folder, save_steps=3, max_loss_retries=2)
    run = Run(model_folder, config)
    for _ in range(2):  # Run again, it says the same.
        with pytest.raises(LossError) as caught:
            Run(model_folder, config).train(checkpoints=tmp_path)
        said = str(caught.value)
        assert "loss is nan at step 8, after 2 retries at lower rates (max_loss_retries is 2" in said
        assert f"Set a learning_rate below {RATE / 4:g}" in said
        assert all(id in said for ids in run.steps[7] for id in ids)
        assert not any(id in said for ids in run.steps[6] for id in ids if id not in run.steps[7][0])
    assert len(recorded(tmp_path)["retries"]) == 2
    with pytest.raises(LossError, match="after 3 retries"):  # More of them are taken up where it ended.
        Run(model_folder, constant(model_folder, save_steps=3)).train(checkpoints=tmp_path)


def test_a_real_nan(tmp_path: Path, model_folder: Path) -> None:
    """At such a rate every weight overflows; half of it, and half of that, is no better."""
    with pytest.raises(LossError, match=r"loss is nan.* at step 2, after 3 retries"):
        Run(model_folder, constant(model_folder, learning_rate=1e38)).train(checkpoints=tmp_path)
    assert [(retry["step"], retry["back_to"]) for retry in recorded(tmp_path)["retries"]] == [(2, 0)] * 3


def test_a_first_step_has_no_retry(tmp_path: Path, model_folder: Path) -> None:
    run = Run(model_folder, constant(model_folder, finetuning_type="full"))
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    with pytest.raises(LossError, match="loss is nan, grad_norm is nan at step 1, after 0 retries"):
        run.train(checkpoints=tmp_path)
    assert not (tmp_path / "recovery.json").exists()


def test_a_real_spike(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights at a rate far too high, judged by the first step alone."""
    monkeypatch.setattr("treering.recovery.FIRST_STEPS", 1)
    config = constant(model_folder, finetuning_type="full", learning_rate=30.0, max_loss_retries=0)
    with pytest.raises(LossError, match=r"above twice the highest of the first 1 steps .* after 0 retries"):
        Run(model_folder, config).train(checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("loss", "first", "bad"),
    [
        (2.9, 1.4, True),  # Half of ln(256) is 2.77.
        (2.7, 0.1, False),  # Far above the first steps, and still far from guessing.
        (2.9, 1.5, False),  # Hard rows, but no harder than twice the first ones.
        (9.0, 5.0, False),
        (11.0, 5.0, True),
        (math.inf, 5.0, True),
    ],
)
def test_what_is_a_spike(loss: float, first: float, bad: bool) -> None:
    log = [{"loss": first / 2}, {"loss": first}, *[{"loss": 0.1}] * 8]

    def is_bad(log: list[dict[str, float]]) -> bool:
        try:
            check_loss({"loss": loss, "grad_norm": 1.0}, log, 256)
        except LossError as error:
            return str(loss) in str(error) or f"{loss:.4g}" in str(error)
        return False

    assert is_bad([*log, {"loss": 99.0}]) is bad  # Later ones do not raise the bar.
    assert is_bad(log[:9]) is (not math.isfinite(loss))  # Too early to tell.
    with pytest.raises(LossError, match="grad_norm is inf"):
        check_loss({"loss": 1.0, "grad_norm": math.inf}, [], 256)


@pytest.mark.parametrize(("first", "loss", "bad"), [(6.0, 12.5, True), (6.0, 11.9, False), (0.1, 11.0, False)])
def test_a_loss_that_runs_away_at_once(first: float, loss: float, bad: bool) -> None:
    """Above twice the first and blind guessing, 5.545 here; the first step has nothing to be compared with."""
    with pytest.raises(LossError, match="above twice that of the first step") if bad else nullcontext():
        check_loss({"loss": loss, "grad_norm": 1.0}, [{"loss": first}, {"loss": 3.0}], 256)
    check_loss({"loss": 99.0, "grad_norm": 1.0}, [], 256)


def test_weights_that_have_stopped_learning() -> None:
    """A rate far too high ends where all logits are the same: ln 256 for every token, and no way from there."""
    log = [{"loss": 6.0, "grad_norm": 5.0}]
    with pytest.raises(
        LossError, match=r"grad_norm is 0 and loss 5\.545, that of blind guessing: nothing is learned any more"
    ):
        check_loss({"loss": math.log(256), "grad_norm": 0.0}, log, 256)
    check_loss({"loss": math.log(256), "grad_norm": 1e-9}, log, 256)
    check_loss({"loss": 0.0, "grad_norm": 0.0}, log, 256)  # Learned by heart.
    check_loss({"loss": 6.0, "grad_norm": 0.0}, log, 256)  # As where a method acts after steps alone.


def test_a_model_that_a_rate_has_killed_is_no_version(model_folder: Path, tmp_path: Path) -> None:
    run = Run(model_folder, settings(model_folder, learning_rate=1e5, max_steps=40, save_steps=5))
    with pytest.raises(LossError, match="nothing is learned any more"):
        run.train(checkpoints=tmp_path)


def test_a_rate_that_is_far_too_high_is_told_early(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(model_folder, constant(model_folder, finetuning_type="full", learning_rate=10.0), growing())
    with pytest.raises(LossError, match="above twice that of the first step"):
        run.train(checkpoints=tmp_path)
    assert len(recorded(tmp_path)["retries"]) == run.config.max_loss_retries
    assert "going back to step 0, with 0.5 of the learning rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["could not create a primitive", "mkldnn_matmul failed, switching to baddbmm: no room"]
)
def test_what_onednn_says_is_a_lack_of_memory(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The second is a warning of torch, which goes on with a kernel that rounds in another way."""
    run, full = Run(model_folder, constant(model_folder), growing()), [True]

    def short(*given: Any, **named: Any) -> Tensor:
        if full and full.pop():
            if text.startswith("could"):
                raise RuntimeError(text)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="mkldnn_matmul failed")  # As model.py has it; pytest forgets.
                warnings.warn(text, stacklevel=1)
        return logits_at(*given, **named)

    monkeypatch.setattr(loop, "logits_at", short)
    log = run.train(checkpoints=tmp_path)
    assert len(log) == len(run.steps) and [split["pieces"] for split in recorded(tmp_path)["splits"]] == [2]


def test_what_a_later_share_switches_off_is_on_again(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    """The first share's failure is the one that is raised; that of the other is to be seen all the same."""
    threads(2)
    run = Run(model_folder, constant(model_folder, per_device_train_batch_size=8), growing())
    calls, both = itertools.count(1), threading.Barrier(2)

    def short(*given: Any, **named: Any) -> Tensor:
        number = next(calls)
        if number in (3, 4):  # Both shares of the second step.
            both.wait(60)
            if number == 3:
                raise RuntimeError("can't allocate memory")
            time.sleep(0.2)
            torch.backends.mkldnn.set_flags(False)
            raise RuntimeError("another error")
        return logits_at(*given, **named)

    monkeypatch.setattr(loop, "logits_at", short)
    log = run.train(checkpoints=tmp_path)
    assert len(log) == len(run.steps) and [split["pieces"] for split in recorded(tmp_path)["splits"]] == [2]
    assert torch._C._get_mkldnn_enabled()


def test_a_backward_pass_that_goes_on_without_onednn_is_done_again(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch warns of there reaches nobody."""
    run, full = Run(model_folder, constant(model_folder), growing()), [True]

    def short(*given: Any, **named: Any) -> Tensor:
        logits = logits_at(*given, **named)
        if full and full.pop():
            logits.register_hook(lambda _: torch.backends.mkldnn.set_flags(False) and None)
        return logits

    monkeypatch.setattr(loop, "logits_at", short)
    log = run.train(checkpoints=tmp_path)
    assert len(log) == len(run.steps) and [split["pieces"] for split in recorded(tmp_path)["splits"]] == [2]
    assert torch.backends.mkldnn.enabled


def test_the_worst_rows_come_first() -> None:
    assert worst({"a": math.nan, "b": math.nan}).startswith("the loss of every row is nan")
    assert worst({"a": 1.0, "b": math.nan, "c": 3.0}) == f"worst first: b (loss nan), c (loss 3), a (loss 1){WHAT}"
    many = worst({f"row{n:02}": float(n) for n in range(20)})
    assert many.startswith("worst first: row19 (loss 19), row18") and many.endswith(
        f", and {20 - MOST_ROWS} more{WHAT}"
    )


def adapting(folder: Path, **values: Any) -> Run:
    """Training that has to split its batches and to go back twice."""
    config = constant(folder, **{"save_steps": 3, "lora_dropout": 0.2, "seed": SEED, **values})
    return Run(folder, config, [*growing(), *examples(8)])


SEED = 0
"""With it the widest batch is none of the first steps'."""


def first_steps_tokens(run: Run) -> int:
    """The most tokens of a batch, padding included, in the first two steps: a later one has more."""
    return max(len(ids) * (max(len(run.rows[id].ids) for id in ids) - 1) for step in run.steps[:2] for ids in step)


@pytest.mark.parametrize("minutes", [1e-9, 1e9])
def test_killed_anywhere_it_repeats_what_it_adapted(
    tmp_path: Path,
    model_folder: Path,
    little_memory: Callable[[int], None],
    too_fast: Callable[[int, float], None],
    minutes: float,
) -> None:
    """Whatever checkpoints the clock adds: the same bits, splits and retries."""
    little_memory(first_steps_tokens(adapting(model_folder)))
    too_fast(8, 0.3 * RATE)
    whole, counted = adapting(model_folder), Counted()
    log = whole.train(checkpoints=tmp_path / "whole", stop=counted)
    found = recorded(tmp_path / "whole")
    assert found["splits"][0]["step"] > 2 and [retry["back_to"] for retry in found["retries"]] == [6, 0]
    rng = random.Random(minutes)
    killed = 0
    for _ in range(100):
        last = adapting(model_folder)
        last.config = last.config.model_copy(update={"save_minutes": minutes})
        try:
            again = last.train(checkpoints=tmp_path / "killed", stop=KillAt(rng.randint(1, counted.looks // 2)))
        except KilledError:
            killed += 1
        else:
            break
    assert killed >= 2
    assert same_bits(whole.weights(), last.weights())
    assert recorded(tmp_path / "killed") == found
    assert [e["loss"] for e in again] == [e["loss"] for e in log]


def test_memory_that_is_there_again_changes_nothing(
    tmp_path: Path, model_folder: Path, little_memory: Callable[[int], None]
) -> None:
    """Killed, and resumed from the start with memory enough, it splits the steps that were split, no others."""

    def run() -> Run:
        return adapting(model_folder, save_steps=50)

    little_memory(first_steps_tokens(run()))
    whole, counted = run(), Counted()
    whole.train(checkpoints=tmp_path / "whole", stop=counted)
    with pytest.raises(KilledError):
        run().train(checkpoints=tmp_path / "killed", stop=KillAt(counted.looks - 1))
    found = recorded(tmp_path / "killed")
    assert found == recorded(tmp_path / "whole") and found["splits"][0]["step"] > 2
    little_memory(10**9)
    for name, checkpoints in (("resumed", tmp_path / "killed"), ("fresh", tmp_path / "fresh")):
        last = run()
        last.train(checkpoints=checkpoints)
        assert same_bits(whole.weights(), last.weights()) is (name == "resumed")


@pytest.mark.parametrize(("failing", "left"), [(8, 7), (2, 1)], ids=["to a checkpoint", "to the beginning"])
def test_killed_between_the_record_and_the_way_back(
    tmp_path: Path,
    model_folder: Path,
    too_fast: Callable[[int, float], None],
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
    left: int,
) -> None:
    """Checkpoints of the way that was given up lie around still; they are not used."""
    too_fast(failing, 0.6 * RATE)
    config = constant(model_folder, save_steps=3, save_minutes=1e-9)
    whole = Run(model_folder, config)
    whole.train(checkpoints=tmp_path / "whole")
    resume = Checkpoints.resume

    def dies(self: Checkpoints) -> Any:
        if (tmp_path / "killed" / "recovery.json").exists():
            raise KilledError
        return resume(self)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "resume", dies)
        with pytest.raises(KilledError):
            Run(model_folder, config).train(checkpoints=tmp_path / "killed")
    assert (tmp_path / "killed" / f"step-{left}").exists()
    last = Run(model_folder, config)
    last.train(checkpoints=tmp_path / "killed")
    assert same_bits(whole.weights(), last.weights())
    assert recorded(tmp_path / "killed") == recorded(tmp_path / "whole")
