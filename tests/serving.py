"""A running server, for the tests that meet it as its users do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from treering import Workspace

ASK: list[Any] = [{"role": "user", "content": "a item 3: sort d"}]
LONG: list[Any] = [{"role": "user", "content": "tell me more"}]


MAIN = "from treering.cli import main; main()"


class Served:
    """A running `treering serve` (or `run`); `program` is what Python runs with those arguments."""

    def __init__(
        self,
        ws: Workspace,
        log: Path,
        command: str = "serve",
        port: int = 0,
        seconds: float = 120,
        program: str = MAIN,
    ) -> None:
        self.ws = ws
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, command, "-w", str(ws.root), "--port", str(port)],
                stdout=out,
                stderr=out,
                cwd=Path(__file__).parents[1],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.url = self._wait_for(r"listening on (http://\S+)/v1", seconds)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=60)

    def _wait_for(self, pattern: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(pattern, self.log.read_text())
            if found:
                return found[1]
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(self.log.read_text())

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def ask(self, model: str = "current", **settings: Any) -> Any:
        return self.client.chat.completions.create(**{"model": model, "messages": ASK, "max_tokens": 12, **settings})

    def worker(self) -> int:
        """The process id of the child that generates."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(
            int(child) for child in children if "treering.serve.worker" in Path(f"/proc/{child}/cmdline").read_text()
        )

    def eventually(self, check: Callable[[], bool], seconds: float = 60, pause: float = 0.02) -> None:
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(pause)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def greedy(ws: Workspace, version: str, messages: list[Any], most: int) -> str:
    """What `version` answers, by transformers and peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = ws.config().model_name_or_path
    assert base is not None
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if version != "base":
        model = PeftModel.from_pretrained(model, str(ws.versions / version))
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        written = model.eval().generate(
            **asked,
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
