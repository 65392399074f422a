"""Limits of a process, of its memory and of its files, that are really met."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.nursery import Nursery
from tests.test_bad_input import snapshot
from tests.test_recovery import long_rows, recorded
from tests.training import Run, chat, examples, settings
from treering import Workspace, registry
from treering.data.example import Example
from treering.evaluate import evaluate
from treering.results import Result


@pytest.fixture(scope="module")
def nursery(model_folder: Path) -> Iterator[Nursery]:
    made = Nursery(model_folder)
    yield made
    made.close()


BATCHES = """
import resource, sys
from pathlib import Path
from tests.test_recovery import long_rows

folder, checkpoints = map(Path, sys.argv[1:])
long_rows(folder, rows=2).train()  # What torch takes once.
run = long_rows(folder)
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 150 * 2**20, resource.RLIM_INFINITY))
print([entry["loss"] for entry in run.train(checkpoints=checkpoints)])
"""


def test_batches_that_do_not_fit(nursery: Nursery, tmp_path: Path, model_folder: Path) -> None:
    """The allocator's real error, in the middle of real passes; what a failed pass took is there again for the next."""
    done = nursery.run(BATCHES, model_folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert 2 <= recorded(tmp_path)["splits"][-1]["pieces"] <= 8
    assert "out of memory at step 1 ([enforce fail" in done.stderr
    log = long_rows(model_folder).train()
    assert json.loads(done.stdout) == pytest.approx([entry["loss"] for entry in log], rel=1e-4)


STATE = """
import resource, sys
from pathlib import Path
from tests.test_limits import wide
from treering import optimizers

folder, checkpoints, limited = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
make = optimizers.optimizer

class Limited:
    def __init__(self, *args):
        self.made = make(*args)

    def __getattr__(self, name):
        return getattr(self.made, name)

    def step(self):
        global limited
        limited -= 1
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if limited >= 0:
            resource.setrlimit(resource.RLIMIT_AS, (now + 30 * 2**20, resource.RLIM_INFINITY))
        try:
            self.made.step()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

optimizers.optimizer = Limited
print([entry["loss"] for entry in wide(folder).train(checkpoints=checkpoints)])
"""


def wide(folder: Path) -> Run:
    """Two steps that change 32 MB of weights; AdamW's state takes 64 MB."""
    values = {"lora_rank": 4096, "max_steps": 2, "per_device_train_batch_size": 4}
    return Run(folder, settings(folder, **values), examples(4))


@pytest.mark.parametrize("limited", [1, 99])
def test_a_state_of_the_optimizer_that_does_not_fit(
    nursery: Nursery, tmp_path: Path, model_folder: Path, limited: int
) -> None:
    """Some of the state is made by then."""
    done = nursery.run(STATE, model_folder, tmp_path, limited)
    splits = recorded(tmp_path)["splits"]
    assert "out of memory at step 1 (while the weights were changed: [enforce fail" in splits[0]["reason"]
    if limited > 1:
        assert done.returncode == 1 and "with one row at a time. Set optim: adamw_8bit" in done.stderr
        assert [split["pieces"] for split in splits] == [2, 4]
        assert [path.name for path in tmp_path.glob("step-*")] == ["step-0"]
        return
    assert done.returncode == 0, done.stderr
    assert [split["pieces"] for split in splits] == [2]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "recovery.json").write_text((tmp_path / "recovery.json").read_text())
    log = wide(model_folder).train(checkpoints=tmp_path / "whole")
    assert json.loads(done.stdout) == [entry["loss"] for entry in log]


READING = """
import resource, sys
from pathlib import Path
from tests.test_limits import long_answers, scored
from treering import passes

passes.TOKENS = 2**14
run, pairs = long_answers(Path(sys.argv[1]))
scored(run, pairs[:2])  # What torch takes once.
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 50 * 2**20, resource.RLIM_INFINITY))
print([result.loss for result in scored(run, pairs)])
"""


def long_answers(folder: Path) -> tuple[Run, list[tuple[Example, str]]]:
    """Rows that take 110 MB where all of them go together."""
    found = [chat(("user", f"{number:02}" + "x" * 100), ("assistant", "y" * 200)) for number in range(32)]
    return Run(folder, settings(folder, eval={"max_new_tokens": 2}), found), [(row, "task") for row in found]


def scored(run: Run, pairs: Sequence[tuple[Example, str]]) -> list[Result]:
    return evaluate(run.model, run.tokenizer, pairs, {"task": "exact_match"}, run.config, quiet=True)


def test_rows_to_read_that_do_not_fit(nursery: Nursery, model_folder: Path) -> None:
    done = nursery.run(READING, model_folder)
    assert done.returncode == 0, done.stderr
    assert "out of memory when reading rows ([enforce fail" in done.stderr
    whole = [result.loss for result in scored(*long_answers(model_folder))]
    assert json.loads(done.stdout) == pytest.approx(whole, rel=1e-4)


PRODUCT = """
import resource, torch
import treering.model
from treering.errors import no_memory

def held():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

torch.set_num_threads(1)
small = torch.randn(2, 4, 300, 512).bfloat16()
before = torch.bmm(small[0], small[1].mT)
x, y = torch.randn(1, 900, 901).bfloat16(), torch.randn(1, 901, 903).bfloat16()
out = torch.empty(1, 900, 903).bfloat16()
unlimited, met, fits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY), [], 0
for left in range(0, 64, 2):
    resource.setrlimit(resource.RLIMIT_AS, (held() + left * 2**17, resource.RLIM_INFINITY))
    try:
        torch.bmm(x, y, out=out)
        fits += 1
    except Exception as error:
        met.append(error)
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    if fits == 3:  # With more it goes on so.
        break
assert met and all(map(no_memory, met)), met
assert torch._C._get_mkldnn_enabled()
assert torch.equal(before, torch.bmm(small[0], small[1].mT))
print(met[-1])
"""


def test_after_a_product_that_finds_no_memory_the_next_is_the_same() -> None:
    """In a process of its own: what lies free in the nursery's would be enough for it."""
    ended = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    if torch.cpu._is_avx512_bf16_supported():
        assert "mkldnn_matmul failed" in ended.stdout


def test_torch_may_not_change_kernels_silently(nursery: Nursery) -> None:
    ended = nursery.run("import warnings; warnings.warn('mkldnn_matmul failed, switching to baddbmm: no room')")
    assert ended.returncode == 1 and "UserWarning: mkldnn_matmul failed" in ended.stderr


FULL_DISK = """
import json, resource, signal, sys
from treering.cli import run

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in json.loads(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert run(["update", "save_steps=1", "-w", sys.argv[1]]) == 1, limit
"""


def test_a_full_disk(nursery: Nursery, made: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made, tmp_path / "ws", symlinks=True))
    before = snapshot(root)
    # Too small for the plan, for a checkpoint, for the version's report.
    done = nursery.run(FULL_DISK, root, json.dumps([100, 20_000, 2_000_000]))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"treering: cannot write to {root}: a file-size limit is met. Free some space") == 3
    assert "Traceback" not in done.stderr
    assert snapshot(root) == before
    ws = Workspace(root)
    assert [version.problems() for version in registry.versions(ws)] == [[], []]
    made_of_it = ws.update(save_steps=1)
    assert made_of_it is not None and made_of_it.promote and made_of_it.name == "v3"
    assert [version.problems() for version in registry.versions(ws)] == [[], [], []]
