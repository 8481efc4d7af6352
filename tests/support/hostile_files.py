"""Fuzzes the readers of files from other programs: a reader must return a value or raise a one-line error.

`python tests/support/hostile_files.py ROUNDS [KIND ...]` runs ROUNDS mutations of every kind and prints the failures.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from safelora_fast.errors import SafeLoraFastError

LONGEST = 4000  # characters of a message
DEEP = 3000
WRONG: list[Any] = [
    None, True, False, 0, -1, 1, 3.5, 10**30, -(10**18), 2**63 - 1, 1e308, 5e-324, float("nan"), float("inf"), "", "x", "Ω" * 40,
    "x" * 100_000, "\ud800", "a\nb\x1b[31m", "../..", "/dev/null", "\0", "1e400", [], {}, [[]], [None], {"": None}, ["x"] * 3,
    [0.5], list(range(2000)), {"a": {"b": {"c": []}}}, {"format": 1}, [["x", 1]], "1.2.3", "LORA", "9" * 5000,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a document, starting with the root."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def mutated(document: Any, chance: random.Random) -> Any:
    """Return a copy of a document with one to three values replaced, removed, doubled, or nested."""
    changed = copy.deepcopy(document)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        path = chance.choice(places(changed))
        if not path:
            if chance.random() < 0.8:
                continue
            return chance.choice(WRONG)
        inside = changed
        for key in path[:-1]:
            inside = inside[key]
        how = chance.random()
        if how < 0.6:
            inside[path[-1]] = copy.deepcopy(chance.choice(WRONG))
        elif how < 0.75:
            del inside[path[-1]]
        elif how < 0.85:
            inside[path[-1]] = nested(chance.choice([20, 90, 150]), chance.choice(["list", "dict"]))
        elif isinstance(inside, dict):
            inside[chance.choice(["", "extra", "use_new", "\ud800", str(path[-1]) * 2])] = chance.choice(WRONG)
        else:
            inside.append(copy.deepcopy(inside[path[-1]]))
    return changed


def nested(depth: int, how: str) -> Any:
    value: Any = "core"
    for _ in range(depth):
        value = [value] if how == "list" else {"k": value}
    return value


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    """Return the bytes truncated, changed, doubled, or nested deeper than any parser's stack."""
    place = chance.randrange(len(content) + 1)
    before, after = content[:place], content[place:]
    return chance.choice(
        [
            before,
            before + bytes([chance.randrange(256)]) + after[1:],
            before + b"[" * DEEP + after,
            before + b'{"a":' * DEEP + after,
            b"\xef\xbb\xbf" + content,
            content.decode(errors="replace").encode("utf-16"),
            content + content,
            before + b"\0" * chance.randrange(1, 9) + after,
            b"[" * 100_000 + content,
        ]
    )


def of_json(document: Any, chance: random.Random) -> bytes:
    """Return a mutated document as JSON; one time in five, the bytes are mutated instead."""
    if chance.random() < 0.2:
        return mutated_bytes(json.dumps(document).encode(), chance)
    return json.dumps(mutated(document, chance)).encode()


def of_lines(documents: list[Any], chance: random.Random) -> bytes:
    """Return JSON lines, one of them mutated."""
    lines = [json.dumps(document).encode() for document in documents]
    number = chance.randrange(len(lines))
    lines[number] = of_json(documents[number], chance).replace(b"\n", b" ")
    return b"\n".join(lines) + (b"\n" if chance.random() < 0.9 else b"")


def of_yaml(text: str, chance: random.Random) -> bytes:
    """Return a mutated document as JSON (valid YAML), or the text with mutated bytes or exploding aliases."""
    import yaml

    how = chance.random()
    if how < 0.25:
        return mutated_bytes(text.encode(), chance)
    if how < 0.3:
        lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
        return "\n".join(["a0: &a0 [x]", *lines, text]).encode()
    return json.dumps(mutated(yaml.safe_load(text), chance)).encode()


def fault_of(read: Any, path: Path) -> str | None:
    """Describe a reader's failure; None if it read the file or raised a one-line SafeLoraFastError."""
    try:
        read(path)
    except SafeLoraFastError as error:
        said = str(error)
        if len(said) > LONGEST:
            return f"a message of {len(said)} characters: {said[:200]}"
        return None
    except RecursionError:
        return "RecursionError"
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "safelora_fast" in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(error).__name__} in {where}: {str(error)[:160]}"
    return None


def faults(kind: Any, rounds: int, seed: int = 0) -> Counter[str]:
    """Run `rounds` mutations of a kind of file, and count the failures by description."""
    found: Counter[str] = Counter()
    former = kind.path.read_bytes() if kind.path.exists() else None
    for number in range(rounds):
        chance = random.Random(f"{kind.name} {seed} {number}")
        kind.path.write_bytes(kind.content(chance))
        with contextlib.redirect_stdout(io.StringIO()):
            fault = fault_of(kind.read, kind.path)
        if fault is not None:
            found[fault] += 1
    if former is None:
        kind.path.unlink()
    else:
        kind.path.write_bytes(former)
    return found


if __name__ == "__main__":
    from hostile_kinds import kinds

    rounds, names = int(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds(Path(folder)):
            if names and kind.name not in names:
                continue
            fell = faults(kind, rounds)
            print(f"{kind.name}: {rounds} mutations, {sum(fell.values())} fell", flush=True)
            for fault, count in fell.most_common(8):
                print(f"    {count} × {fault!r}", flush=True)
