"""A vLLM server of our own: started on loopback, started again when it dies, ended with ours."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from treering.serve.engine import EngineError

if TYPE_CHECKING:
    from treering.config import Config
    from treering.serve.vllm.base import Base

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""

log = logging.getLogger("treering.serve")


def command(config: Config, base: Base, ranks: Iterable[int]) -> list[str]:
    """The vLLM server that fits the settings; `ranks` are those of the versions there are."""
    serve = config.serve
    highest = max(config.lora_rank, *ranks, 0)
    if config.adapter_composition == "stack":
        highest *= 2  # Ranks grow while it runs.
    settings: dict[str, object] = {
        "model": base.folder,
        "host": "127.0.0.1",
        "dtype": base.dtype,
        "max-loras": serve.max_loaded_versions + 2,  # The base model's stand-in, and one while `current` moves.
        "max-lora-rank": next((size for size in RANKS if size >= highest), RANKS[-1]),
        "max-num-seqs": serve.max_batch_size,
        "scheduling-policy": "priority",
        "generation-config": "vllm",
        # Small models would fill an answer that may be any JSON with blanks up to its limit.
        "structured-outputs-config": '{"backend": "guidance", "disable_any_whitespace": true}',
        "uvicorn-log-level": "warning",
    }
    return [
        serve.vllm_python or sys.executable,
        *("-m", "vllm.entrypoints.openai.api_server", "--enable-lora"),
        *(part for name, value in settings.items() for part in (f"--{name}", str(value))),
        *(["--trust-remote-code"] if config.trust_remote_code else []),
        *shlex.split(serve.vllm_arguments or ""),
    ]


class Child:
    """Keeps one vLLM server running. What it prints goes to `output`."""

    def __init__(self, command: list[str], output: Path) -> None:
        self.url = ""
        self.key = secrets.token_urlsafe(24)
        self._command = command
        self._output = output
        self._was_ready = False
        self._failures = 0

    def is_ready(self) -> None:
        """It answers: when it dies, another is started at once."""
        self._was_ready, self._failures = True, 0

    async def run(self) -> None:
        """Until cancelled. Raises `EngineError` if it ends before it was ever ready."""
        while True:
            code = await self._once()
            if not self._was_ready:
                raise EngineError(
                    f"vLLM ended with code {code} before it was ready; {self._output} says why. It is started by "
                    f"{self._command[0]} (serve.vllm_python), which needs vLLM installed"
                )
            wait = min(FIRST_WAIT * 2**self._failures, LONGEST_WAIT)
            self._failures += 1
            log.error("vLLM ended with code %s; starting another in %g s", code, wait)
            await asyncio.sleep(wait)

    async def _once(self) -> int:
        """Run it until it ends; returns its exit code."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        ours = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_API_KEY": self.key}
        with self._output.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "treering.serve.vllm.lifeline"),
                *(*self._command, "--port", str(port)),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={"VLLM_NO_USAGE_STATS": "1", **os.environ, **ours},
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            return await process.wait()
        finally:
            process.stdin.close()
            await process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
