"""Starting the processes that train (`launcher`), following them, ending them; the update itself stays one process.

It holds the workspace, plans, judges and writes the version. Its processes get a `Handover` and leave checkpoints; from
the last of them the update goes on as from any checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from treering.config import Config
from treering.errors import ConfigError, ModelError, TreeringError, VersionError, full_disk_is_clear
from treering.extras import needed
from treering.files import sha256, write_file
from treering.handover import Handover
from treering.progress import bar
from treering.recovery import LossError
from treering.settings import read_yaml
from treering.worker import GRACE, LOG, TOKEN, WANTED, Trained

if TYPE_CHECKING:
    from treering.stop import Stop

KINDS = ("MULTI_GPU", "FSDP")
"""What `distributed_type` may be in a file of accelerate's."""

_KINDS = {kind.__name__: kind for kind in (ConfigError, LossError, ModelError, VersionError)}
"""What a process may have raised that means something to whoever called the update."""

_POLL = 0.1


def check(config: Config, root: Path) -> None:
    """Raise `ConfigError` where the processes that `config` asks for cannot be started; `root` is the workspace's."""
    if config.launcher == "ray":
        needed("ray.train.torch", "ray", "launcher is ray")
    path = _accelerate_config(config, root)
    if path is None:
        return
    found = read_yaml(path)
    said = f"accelerate_config is {config.accelerate_config}, and {path} has"
    if found.get("distributed_type") not in KINDS:
        raise ConfigError(
            f"{said} distributed_type {found.get('distributed_type')}; treering trains with {' and '.join(KINDS)}: run "
            "`accelerate config` again, or leave accelerate_config out"
        )
    if found.get("mixed_precision", "no") != "no":
        raise ConfigError(
            f"{said} mixed_precision {found['mixed_precision']}; set mixed_precision: 'no' there, and bf16 or fp16 here"
        )
    if found["distributed_type"] == "FSDP":
        _check_shards(config, found.get("fsdp_config") or {}, said)
    if found.get("num_machines", 1) != 1:
        raise ConfigError(
            f"{said} num_machines {found['num_machines']}; across machines take launcher: ray, or set num_machines: 1"
        )


def _check_shards(config: Config, found: Mapping[str, Any], said: str) -> None:
    """Raise `ConfigError` for what does not go with weights in shards."""
    for key, only in (("fsdp_version", 2), ("fsdp_cpu_ram_efficient_loading", False)):
        if found.get(key) != only:
            raise ConfigError(f"{said} {key} {found.get(key)} in fsdp_config; set {key}: {str(only).lower()}")
    for key, wanted in (("optim", "adamw_torch"), ("quantization_bit", None), ("neftune_noise_alpha", None)):
        if (value := getattr(config, key)) != wanted:
            way_out = f"set {key}: {wanted}" if wanted else f"leave {key} out"
            raise ConfigError(f"{said} FSDP, but {key} is {value}, which does not go with it: {way_out}")


def machine(config: Config, root: Path) -> dict[str, Any]:
    """What the bits depend on besides the processor (`Plan.machine`)."""
    path = _accelerate_config(config, root)
    found = {"launcher": config.launcher, "processes": config.processes}
    return found | ({"accelerate_config": sha256(path)} if path else {})


def threads(config: Config, all_threads: int) -> int:
    """How many of the machine's threads each process has."""
    return max(1, all_threads // config.processes)


def train(
    handover: Handover,
    folder: Path,
    root: Path,
    *,
    stop: Stop | None = None,
    track: Callable[[Mapping[str, float]], None] | None = None,
    quiet: bool = False,
) -> list[Trained]:
    """Have the processes train to the last checkpoint; `folder` is for what they and the update tell each other.

    Each entry of the log is given to `track`. Returns how each process came to the end. Raises what one of them
    raised, `UpdateInterruptedError` when `stop` was asked, and `TreeringError` where one died.
    """
    config = handover.config
    folder.parent.mkdir(parents=True, exist_ok=True)
    patient = stop.patient() if stop is not None else nullcontext()  # The processes keep where they are.
    with patient, _wanted(folder) as let_go, bar("training", len(handover.steps), quiet) as advance:
        handover.save(folder)
        command = _command(config, folder, root)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # Standard output is for the update's own answer.
            start_new_session=True,  # Ctrl-C reaches the update alone.
            env={"RAY_USAGE_STATS_ENABLED": "0", **os.environ, "OMP_NUM_THREADS": str(handover.threads)},
        )
        entries = _entries(folder / LOG)
        done, deadline = 0, math.inf
        try:
            running = True
            while running and time.monotonic() < deadline:
                running = process.poll() is None
                for entry in next(entries):
                    advance(int(entry["step"]) - done, f"loss {entry['loss']:.3f}")
                    done = int(entry["step"])
                    if track is not None:
                        track(entry)
                if stop is not None and stop.asked and deadline == math.inf:
                    # Before the first step is done they have nothing to keep.
                    deadline = time.monotonic() + (GRACE + 0.5 if done else 0)
                    let_go()
                if deadline < math.inf and None not in _told(folder, config):
                    break
                time.sleep(_POLL if running else 0)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # The launcher alone: its processes see that nobody wants them.
            process.wait()
    if stop is not None:
        stop.check()
    return _outcome(folder, config, process.returncode)


def _entries(path: Path) -> Iterator[list[dict[str, float]]]:
    """Each time, what the log at `path` has got since."""
    read = 0
    while True:
        new = b""
        if path.exists():
            with path.open("rb") as log:
                log.seek(read)
                new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        read += len(whole)
        yield [json.loads(line) for line in whole.splitlines()]


@contextmanager
def _wanted(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock that says "go on" to the processes of this training alone; yields what lets go of it."""
    token = secrets.token_hex()
    # Never removed: whoever is still there of an earlier try looks at this very file.
    descriptor = os.open(folder.parent / WANTED, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        os.pwrite(descriptor, token.encode(), 0)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_file(folder / TOKEN, token.encode())
        yield lambda: fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _command(config: Config, folder: Path, root: Path) -> list[str]:
    if config.launcher == "ray":
        return [sys.executable, "-P", "-m", "treering.ray_workers", str(folder)]
    path = _accelerate_config(config, root)
    if path is None:
        path = folder / "accelerate.yaml"
        kind = "MULTI_GPU" if config.processes > 1 else "NO"  # Which means processes, on whatever is here.
        settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind, "mixed_precision": "no"}
        write_file(path, yaml.safe_dump({**settings, "num_machines": 1, "use_cpu": False}).encode())
    launch = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--config_file", str(path)]
    launch += ["--num_processes", str(config.processes), "--main_process_port", "0"]
    return [*launch, "-m", "treering.worker", str(folder)]


def _accelerate_config(config: Config, root: Path) -> Path | None:
    """Raises `ConfigError` where there is no such file."""
    if config.accelerate_config is None:
        return None
    path = root / config.accelerate_config
    if not path.is_file():
        raise ConfigError(
            f"accelerate_config is {config.accelerate_config}, but there is no file {path}; write it with `accelerate "
            f"config --config_file {path}`, or leave accelerate_config out"
        )
    return path


def _told(folder: Path, config: Config) -> list[dict[str, Any] | None]:
    """What came of each process; None: it has not said."""
    paths = [folder / f"rank-{rank}.json" for rank in range(config.processes)]
    return [json.loads(path.read_text(encoding="utf-8")) if path.exists() else None for path in paths]


def _outcome(folder: Path, config: Config, code: int) -> list[Trained]:
    told = _told(folder, config)
    silent = [str(rank + 1) for rank, found in enumerate(told) if found is None]
    if silent:
        with full_disk_is_clear(folder):  # Then they could not say so either.
            write_file(folder / "room", bytes(4096))
            (folder / "room").unlink()
        raise TreeringError(
            f"of the {config.processes} processes that train (launcher: {config.launcher}, exit code {code}), number "
            f"{', '.join(silent)} died; what it printed says why. With nothing printed it was often killed for want of "
            "memory: lower per_device_train_batch_size or processes. The checkpoint is kept: run `treering update` "
            "again to resume"
        )
    for found in told:
        if found and "error" in found:
            raise _KINDS.get(found["kind"], TreeringError)(found["error"])
    return [Trained(**found) for found in told if found]
