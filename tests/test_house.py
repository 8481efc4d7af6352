"""Rules of the package layout: imports go down only, a file name means one thing, and no file is a fragment."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import safelora_fast
from safelora_fast.defenses import registered

ROOT = Path(safelora_fast.__file__).parent
# From the bottom up: a room imports only from the rooms before it.
ROOMS = [
    "former_modules",
    "printable",
    "errors",
    "files",
    "plotting",
    "examples",
    "ops",
    "checkpoints",
    "projection",
    "subspace",
    "whole_models",
    "serving",
    "persona_vector",
    "data",
    "models",
    "defenses",
    "configuration",
    "training",
    "scoring",
    "trainers",
    "recipe",
    "selection",
    "persona",
    "screening",
    "judging",
    "compare",
    "gate",
    "demo",
    "cli",
]
# Names that mean the same in every room. Files of cli/ and compare/measures/ have the name of a command or a measure.
SHARED_NAMES = {"base", "card", "journal", "page", "plan", "plot", "report", "store", "sweep"}
# British spellings. Users may type them (configuration/synonyms.py), 0.1.0 wrote two, and data is as its authors wrote it.
BRITISH = re.compile(
    r"defence|behaviour|(?:norm|optim|diagonal|random|quant|final|general|penal|tok?en)is(?:e|ed|ing|ation)|learnt|favour"
)
KEPT = {"configuration/synonyms.py", "checkpoints/pairing.py", "compare/report.py"}
FILES = {file: file.relative_to(ROOT).with_suffix("").parts for file in sorted(ROOT.rglob("*.py"))}


def imported_modules(file: Path):
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_down_only():
    wrong = []
    for file, (room, *_) in FILES.items():
        if room in ROOMS:
            targets = {name.split(".")[1] for name in imported_modules(file) if name.startswith("safelora_fast.")}
            above = targets.intersection(ROOMS[ROOMS.index(room) + 1 :])
            wrong += [f"{file.relative_to(ROOT)} imports from {name}/" for name in sorted(above)]
    assert wrong == []
    assert {room for room, *_ in FILES.values()} - set(ROOMS) == {"__init__", "__main__"}


def test_no_files_import_each_other():
    names = {".".join(("safelora_fast", *parts)).removesuffix(".__init__"): file for file, parts in FILES.items()}
    del names["safelora_fast"]  # it only passes public names on
    imports = {}
    for name, file in names.items():
        found = {target if target in names else target.rpartition(".")[0] for target in imported_modules(file)}
        imports[name] = found & names.keys() - {name}
    TopologicalSorter(imports).prepare()  # a CycleError names the files


def test_a_file_name_means_one_thing():
    rooms = defaultdict(set)
    for parts in FILES.values():
        if not parts[-1].startswith("__") and parts[0] != "cli" and parts[:2] != ("compare", "measures"):
            rooms[parts[-1]].add(parts[0])
    assert {name: found for name, found in rooms.items() if len(found) > 1 and name not in SHARED_NAMES} == {}


def test_no_file_is_a_fragment():
    lines = {file: len(file.read_text("utf-8").splitlines()) for file in FILES}
    short = [str(file.relative_to(ROOT)) for file in FILES if lines[file] < 20 and not file.name.startswith("__")]
    assert short == []


def test_only_defenses_know_defenses_by_name():
    names = {kind.__name__ for kind in registered().values()}
    found = set()
    for file, (room, *_) in FILES.items():
        nodes = ast.walk(ast.parse(file.read_text("utf-8"))) if room != "defenses" else ()
        found |= {(str(file), node.id) for node in nodes if isinstance(node, ast.Name) and node.id in names}
        found |= {
            (str(file), name) for name in imported_modules(file) if room != "defenses" and name.split(".")[-1] in names
        }
    assert found == set()


def test_spelling_is_american():
    project = Path(__file__).parents[1]
    texts = [file for file in FILES if str(file.relative_to(ROOT)) not in KEPT]
    texts += [*project.glob("*.md"), *(project / "docs").rglob("*.md"), *(project / "rust").rglob("*.rs")]
    wrong = {str(file): words for file in texts if (words := BRITISH.findall(file.read_text("utf-8")))}
    assert wrong == {}
