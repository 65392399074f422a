"""Data files of every container and row shape, and what may be wrong with them: the same for the same seed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

Record = dict[str, Any]

_SYLLABLES = ["ba", "ko", "ri", "tem", "su", "ola", "vin", "de", "pra", "mo", "xu", "fel"]
_CHINESE = "我的订单什么时候到可以退款吗请问这个多少钱谢谢你好天气怎么样一般三天就能"


def words(rng: random.Random, count: int = 8) -> str:
    """A text that nearly equals no other."""
    return " ".join("".join(rng.choices(_SYLLABLES, k=4)) for _ in range(count))


def chinese(rng: random.Random) -> str:
    return "".join(rng.choices(_CHINESE, k=20))


def _messages(rng: random.Random) -> Record:
    system = [{"role": "system", "content": "be kind"}] * rng.randint(0, 1)
    turns = [{"role": "user", "content": words(rng)}, {"role": "assistant", "content": words(rng)}]
    return {"messages": [*system, *turns * rng.randint(1, 2)]}


def _sharegpt(rng: random.Random) -> Record:
    asked, answered = rng.choice([("human", "gpt"), ("user", "assistant"), ("prompter", "bot"), ("用户", "助手")])
    role, content = rng.choice([("from", "value"), ("role", "content"), ("角色", "内容"), ("speaker", "text")])
    turns = [{role: asked, content: words(rng)}, {role: answered, content: words(rng)}]
    return {rng.choice(["conversations", "conversation", "对话"]): turns, "system": rng.choice(["", "be kind"])}


def _alpaca(rng: random.Random) -> Record:
    past = [[words(rng), words(rng)] for _ in range(rng.randint(0, 2))]
    return {"instruction": words(rng), "input": "", "output": words(rng), "system": "be kind", "history": past}


def _pair(rng: random.Random) -> Record:
    return {"prompt": words(rng), rng.choice(["completion", "response"]): words(rng)}


def _question(rng: random.Random) -> Record:
    return {"question": words(rng), "answer": words(rng, 3)}


def _label(rng: random.Random) -> Record:
    return {rng.choice(["text", "utterance"]): words(rng), rng.choice(["label", "intent"]): rng.choice(["a", "b", 3])}


def _preference(rng: random.Random) -> Record:
    return {"prompt": words(rng), "chosen": words(rng), "rejected": words(rng)}


def _preferred_turns(rng: random.Random) -> Record:
    asked = {"role": "user", "content": words(rng)}
    sides = [[asked, {"role": "assistant", "content": words(rng)}] for _ in range(2)]
    return {"chosen": sides[0], "rejected": sides[1]}


def _called(rng: random.Random) -> Record:
    function = {"name": rng.choice(["find", "send"]), "arguments": rng.choice(['{"a": 1}', {"a": words(rng, 1)}])}
    asked = {"role": "user", "content": words(rng)}
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    return {"messages": [asked, turn], "tools": [{"type": "function", "function": {"name": "find"}}]}


def _text(rng: random.Random) -> Record:
    return {"text": words(rng, 12)}


def _in_chinese(rng: random.Random) -> Record:
    asked, answered = rng.choice([("问题", "答案"), ("指令", "输出"), ("文本", "标签"), ("提示", "回复")])
    return {asked: chinese(rng), answered: chinese(rng)}


FLAT: tuple[Callable[[random.Random], Record], ...] = (_pair, _question, _label, _preference, _in_chinese, _text)
SHAPES = (*FLAT, _messages, _sharegpt, _alpaca, _preferred_turns, _called)


# Containers


def jsonl(rows: Sequence[Record]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=len(rows) % 2 == 0) + "\n" for row in rows).encode(
        errors="surrogatepass"
    )


def _json(rows: Sequence[Record]) -> bytes:
    return json.dumps(list(rows), ensure_ascii=False, indent=len(rows) % 2 or None).encode(errors="surrogatepass")


def _wrapped(rows: Sequence[Record]) -> bytes:
    return json.dumps({"version": 1, "data": list(rows)}).encode()


def table(rows: Sequence[Record], delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    sink = io.StringIO(newline="")
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(sink, names, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode(encoding)


def _arrow(rows: Sequence[Record]) -> pa.Table:
    names = list(dict.fromkeys(key for row in rows for key in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeError):  # Of several types, since it was mutated.
        return pa.array([str(value).encode("utf-8", "replace").decode() for value in values])


def parquet(rows: Sequence[Record]) -> bytes:
    sink = io.BytesIO()
    try:
        pq.write_table(_arrow(rows), sink)
    except pa.ArrowNotImplementedError:  # An empty object.
        return b""
    return sink.getvalue()


def ipc(rows: Sequence[Record], stream: bool) -> bytes:
    made, sink = _arrow(rows), io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=2)
    return sink.getvalue()


def feather(rows: Sequence[Record]) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(_arrow(rows), sink, compression=["lz4", "zstd", "uncompressed"][len(rows) % 3])
    return sink.getvalue()


def binary(suffix: str) -> bool:
    """Whether what ends so is no text."""
    return suffix.endswith((".parquet", ".arrow", ".feather"))


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


WRITERS: dict[str, Callable[[Sequence[Record]], bytes]] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": _json,
    "-wrapped.json": _wrapped,
    ".csv": table,
    ".tsv": lambda rows: table(rows, "\t"),
    "-gbk.csv": lambda rows: table(rows, encoding="gb18030"),
    ".parquet": parquet,
    ".arrow": lambda rows: ipc(rows, stream=False),
    "-stream.arrow": lambda rows: ipc(rows, stream=True),
    ".feather": feather,
}
TABLES = (".csv", ".tsv", "-gbk.csv")
PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".jsonl.gz", ".csv.zst", ".txt", "")


# What may be wrong with a row

HUGE: tuple[Any, ...] = (10**400, -1, 1e308, 0, "9" * 5000)
ODD: tuple[Any, ...] = (None, True, [], {}, "", " ", "\0", "\ud800", "\ufeff", [[]], {"a": {}}, ["x", 5], *HUGE)


def mutated_row(rng: random.Random, row: Record) -> Record:
    """The row with a value, a type or a key changed somewhere."""
    changed: Record = json.loads(json.dumps(row))
    holder: Any = changed
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() < 0.3:
            break
        holder = holder[key]
    way = rng.randrange(5)
    if way == 0:
        holder[key] = rng.choice(ODD)
    elif way == 1:
        del holder[key]
    elif way == 2:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"text": holder[key]}
    elif way == 3 and isinstance(holder, dict):
        holder[rng.choice(["text", "role", "label", "messages", "from", "x", "\ud800", ""])] = holder.pop(key)
    elif isinstance(holder, dict):
        values = list(holder.values())
        rng.shuffle(values)
        holder.update(zip(list(holder), values, strict=True))
    return changed


# What may be wrong with bytes

TOKENS = (
    b"\0",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\\ud800",
    b"\\u0000",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 2000,
    b'{"a":' * 2000,
    b'"',
    b"'",
    b"\\",
    b"\r",
    b"\n",
    b"\n\n",
    b",",
    b"]",
    b"}",
    b"\xe4\xbd",
    "\u2028\x85".encode(),
    b"\x1c\x0b",
    b"=cmd|' /C calc'!A0",
    b"<|im_start|>system",
)
Damage = Callable[[random.Random, bytes, bytes], bytes]


def _flipped(rng: random.Random, content: bytes, _: bytes) -> bytes:
    changed = bytearray(content)
    for _number in range(rng.randint(1, 6)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes, _: bytes) -> bytes:
    return content[: rng.randrange(len(content))] if rng.random() < 0.7 else content[rng.randrange(len(content)) :]


def _doubled(rng: random.Random, content: bytes, _: bytes) -> bytes:
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:end] + content[start:]


def _spliced(rng: random.Random, content: bytes, other: bytes) -> bytes:
    return content[: rng.randrange(len(content))] + other[rng.randrange(len(other)) :]


def _inserted(rng: random.Random, content: bytes, _: bytes) -> bytes:
    place = rng.choice([0, len(content), rng.randrange(len(content))])
    return content[:place] + rng.choice(TOKENS) + content[place:]


def _overwritten(rng: random.Random, content: bytes, _: bytes) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + rng.randbytes(rng.randint(1, 16)) + content[place + rng.randint(1, 16) :]


def _recoded(rng: random.Random, content: bytes, _: bytes) -> bytes:
    encoding = rng.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "gb18030", "shift-jis", "utf-7"])
    return content.decode("utf-8", "replace").encode(encoding, "replace")


DAMAGES: tuple[Damage, ...] = (_flipped, _cut, _doubled, _spliced, _inserted, _overwritten, _recoded)


@dataclass(frozen=True)
class Made:
    """A file's name and content. `ways`: what was done to it."""

    name: str
    content: bytes
    ways: tuple[str, ...]


def made(rng: random.Random, number: int) -> Made:
    """The `number`th file: some rows of one shape in one container, with something wrong at one or two places."""
    suffix = rng.choices(list(WRITERS), [1 if binary(suffix) else 3 for suffix in WRITERS])[0]
    rows, ways = _rows(rng, suffix)
    content = WRITERS[suffix](rows) or b" "
    packing = "" if binary(suffix) else rng.choice(["", "", *PACKERS])
    inside = not packing or rng.random() < 0.8
    if packing and not inside:
        content = PACKERS[packing](content)
    for _ in range(rng.choice([0, 1, 1, 1, 2]) if ways else rng.choice([1, 1, 1, 2])):
        damage = rng.choice(DAMAGES)
        ways.append(damage.__name__.strip("_"))
        content = damage(rng, content or b" ", WRITERS[rng.choice(list(WRITERS))](_rows(rng, ".csv")[0]) or b" ")
    if packing and inside:
        content = PACKERS[packing](content)
    ending = suffix + packing
    if rng.random() < 0.08:
        ways.append("suffix")
        ending = rng.choice(SUFFIXES)
    return Made(f"{number:05}{ending}", content, tuple(ways))


def line_file(rng: random.Random, number: int) -> tuple[Made, int, int]:
    """A file of lines, one of which is damaged but ends where it did; how many lines there are, and which it is."""
    suffix = rng.choice([".jsonl", ".ndjson", ".csv", ".tsv"])
    lines = WRITERS[suffix]([_question(rng) for _ in range(6)]).decode().splitlines()
    place = rng.randrange(suffix in TABLES, len(lines))
    line = lines[place].encode()
    for _ in range(rng.randint(1, 3)):
        damage = rng.choice([_flipped, _cut, _doubled, _inserted])
        line = damage(rng, line or b"x", b"").replace(b"\n", b"").replace(b"\r", b"").replace(b"\0", b"0")
    lines[place] = line.decode("utf-8", "replace").strip() or "x"
    return Made(f"{number:05}{suffix}", "\n".join(lines).encode(), ()), len(lines), place


def saved_dataset(rng: random.Random) -> tuple[dict[str, bytes], str]:
    """The files of a folder as `datasets` saves it, one of them damaged, and its name."""
    shards = {f"data-0000{n}-of-00002.arrow": ipc([_label(rng) for _ in range(3)], stream=True) for n in range(2)}
    state = {"_data_files": [{"filename": name} for name in shards], "_fingerprint": "0", "_split": "train"}
    info = {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}, "citation": ""}
    files = {**shards, "state.json": json.dumps(state).encode(), "dataset_info.json": json.dumps(info).encode()}
    name = rng.choice(list(files))
    files[name] = rng.choice(DAMAGES)(rng, files[name], jsonl([_pair(rng)])) or b" "
    return files, name


def listed_files(rng: random.Random) -> dict[str, bytes]:
    """A folder with LLaMA-Factory's list, which has something wrong with it."""
    columns = {"messages": "talk", "system": "rules"}
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "B"}
    turns = [{"who": "U", "says": words(rng)}, {"who": "B", "says": words(rng)}]
    listed: Record = {
        "shared": {"file_name": "shared.json", "formatting": "sharegpt", "columns": columns, "tags": tags},
        "plain": {"file_name": "plain.json"},
        "ranked": {"file_name": "plain.json", "ranking": True, "columns": {"prompt": "instruction"}},
        "far": {"hf_hub_url": "org/far"},
    }
    for _ in range(rng.randint(0, 2)):
        listed = mutated_row(rng, listed) or {"x": {}}
    content = json.dumps(listed).encode()
    if rng.random() < 0.4:
        content = rng.choice(DAMAGES)(rng, content, b"[]{}") or b" "
    rows = {"shared.json": _json([{"talk": turns}]), "plain.json": _json([_alpaca(rng) for _ in range(2)])}
    return {**rows, "dataset_info.json": content}


def _rows(rng: random.Random, suffix: str) -> tuple[list[Record], list[str]]:
    """Rows, and what was done to some of them."""
    shape = rng.choice(FLAT if suffix in TABLES else SHAPES)
    state = rng.getrandbits(32)
    rows = [shape(random.Random(f"{state}:{number}")) for number in range(rng.randint(1, 9))]
    if suffix in TABLES or rng.random() < 0.6:
        return rows, []
    place = rng.randrange(len(rows))
    rows[place] = mutated_row(rng, rows[place])
    if binary(suffix):
        rows[place] = json.loads(json.dumps(rows[place]).replace("\\ud800", "?"))
    return rows, ["row"]
