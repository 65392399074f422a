"""Room: what the machine has free, what a container leaves of it, and what this process has held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from treering import room


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_limits_of_a_container_and_of_those_around_it(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    groups.write_text("4:memory:/outer/inner\n0::/pod/box\n")
    assert list(room._left(groups, tmp_path)) == []
    second, first = tmp_path / "sys/fs/cgroup/pod/box", tmp_path / "sys/fs/cgroup/memory/outer"
    write(second, memory__max=1000, memory__current=700, memory__stat="anon 500\ninactive_file 150")
    write(second.parent, memory__max="max", memory__current=900, memory__stat="inactive_file 0")
    write(first, memory__limit_in_bytes=500, memory__usage_in_bytes=800, memory__stat="total_inactive_file 40")
    assert sorted(room._left(groups, tmp_path)) == [0, 450]


def test_what_a_container_leaves_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = room.room(tmp_path)
    assert set(free) == {"memory_mb", "disk_mb"} and min(free.values()) > 0
    monkeypatch.setattr(room, "_left", lambda _: iter([3 * 2**20]))
    assert room.room(tmp_path)["memory_mb"] == pytest.approx(room._held_mb() + 3, abs=20)


def test_the_peak_is_this_processs_own() -> None:
    """Neither that of the process that started it, which is larger, nor what it holds now, which is less."""
    mine = bytearray(b"x" * 400 * 2**20)
    code = "a = b'x' * 200 * 2**20; del a\nfrom treering.room import peak_memory_mb, _held_mb\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print(peak_memory_mb(), _held_mb())"], capture_output=True, text=True, check=True
    )
    peak, held = map(float, done.stdout.split())
    assert held < 200 < peak < 400 < room.peak_memory_mb()
    del mine


LIMITED = """
import resource, sys
import torch
from treering.room import _number, keep_to_limit
from pathlib import Path

resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30 if sys.argv[1] == "limited" else resource.RLIM_INFINITY,) * 2)
torch.set_num_threads(1)
keep_to_limit()
for _ in range(3):  # After a large block was freed once, the allocator keeps those of its size for itself.
    torch.empty(7 * 2**20)
before = _number(Path("/proc/self/status"), "VmSize")
blocks, pins = [], []
for _ in range(32):
    blocks.append(torch.empty(2**20))
    pins.append(torch.empty(2**14))
del blocks
print((_number(Path("/proc/self/status"), "VmSize") - before) // 1024)
"""


@pytest.mark.parametrize(("limit", "least", "most"), [("limited", 0, 10), ("none", 15, 400)])
def test_under_a_limit_what_is_freed_leaves_the_address_space(limit: str, least: int, most: int) -> None:
    """Blocks of 4 MB, with small ones between that stay."""
    done = subprocess.run([sys.executable, "-c", LIMITED, limit], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert least <= int(done.stdout) <= most
