"""General text for `memory.general`: what the untouched model answers to general prompts.

    python benchmarks/general.py --out general.jsonl [--prompts FILE] [--model MODEL] [--tokens 48]

`FILE` has a prompt a line; `treering/anything.txt` by default, none of which is among the questions that
`treering bench quality --general` asks. Replayed with `memory.general: general.jsonl`, a share of each epoch, the
answers keep an adapter from answering everything as if it were a task.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from treering import anything
from treering.config import Config
from treering.data.example import Message
from treering.files import write_file
from treering.greedy import generate
from treering.model import load_base, load_tokenizer, resolve


def main() -> None:
    """Write a row a prompt."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=anything.FILE)
    parser.add_argument("--model", help="a folder or a hub name; the default model otherwise")
    parser.add_argument("--tokens", type=int, default=48, help="how long an answer may be; longer ones are cut")
    given = parser.parse_args()
    config = Config.build({"model_name_or_path": given.model} if given.model else {})
    base = resolve(config.model_name_or_path)
    model, tokenizer = load_base(base, config), load_tokenizer(base)
    model.eval()
    prompts = anything.prompts(given.prompts)
    asked = [[Message("user", prompt)] for prompt in prompts]
    answers = generate(model, tokenizer, asked, [given.tokens] * len(asked), config)
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]
    write_file(given.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    print(f"{len(rows)} rows written to {given.out}")


if __name__ == "__main__":
    main()
