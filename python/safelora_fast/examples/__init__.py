"""Recipes, a comparison and a policy that come with this package, with the rows that they name."""

from __future__ import annotations

import re
from pathlib import Path

from safelora_fast.errors import OutputError, SettingsError
from safelora_fast.files.output import described

FOLDER = Path(__file__).parent
DATA = FOLDER.parent / "demo" / "data"
ROWS = re.compile(r"[\w-]+\.jsonl")


def names() -> dict[str, str]:
    """What each example is for, its first line, by its name."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for file in files}


def command_of(name: str) -> str:
    """Return the command that reads an example, from its second line: of `[…]`, only a dry run is kept."""
    line = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1].lstrip("# ")
    return line.partition(" [")[0] + (" --dry-run" if "[--dry-run]" in line else "")


def copy_example(name: str, folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Write an example and the rows that it names into a folder; returns the files, the example first.

    Raises:
        SettingsError: there is no such example.
        OutputError: a file of another content exists and must not be overwritten, or the folder cannot be written.
    """
    if name not in names():
        raise SettingsError(f"there is no example {name!r}; known are {', '.join(names())}")
    source = FOLDER / f"{name}.yaml"
    rows = dict.fromkeys(ROWS.findall(source.read_text(encoding="utf-8")))
    sources = [source, *(DATA / row for row in rows if (DATA / row).is_file())]
    targets = {folder / file.name: file.read_bytes() for file in sources}
    with described(folder):
        for target, content in targets.items():
            if target.exists() and not overwrite and target.read_bytes() != content:
                raise OutputError(f"{target}: exists already; choose another --output, or pass --overwrite")
        folder.mkdir(parents=True, exist_ok=True)
        for target, content in targets.items():
            target.write_bytes(content)
    return list(targets)
