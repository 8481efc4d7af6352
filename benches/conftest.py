"""Print one table per suite at the end of the run; with --record, also write it as CSV to benches/results/."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

Row = dict[str, object]
RESULTS = Path(__file__).parent / "results"
tables: dict[str, list[Row]] = defaultdict(list)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the tables to benches/results/<suite>-<date>.csv")
    parser.addoption(
        "--models", default="0.5b", help="whole-model suite: comma-separated among 0.5b and 7b (30 GB of disk)"
    )
    parser.addoption("--fleet", default="100", help="fleet suite: comma-separated numbers of adapters")
    parser.addoption(
        "--model", type=Path, help="training and selection suites: a model's folder; default: a 135M model"
    )
    parser.addoption("--providers", default="", help="training suite: names separated by semicolons; default: all")
    parser.addoption("--levels", help="projection suite: comma-separated among scalar, avx2 and avx512")
    parser.addoption(
        "--scratch", type=Path, help="folder for the random checkpoints (kept, so that they are made once)"
    )


@pytest.fixture
def add_row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add a row to the table of the calling suite: `add_row(shape="4096x4096", ms=2.1)`."""
    suite = Path(str(request.node.fspath)).stem.removeprefix("test_")
    return lambda **row: tables[suite].append(row)


def machine() -> Row:
    """Columns of every recorded row: the machine and the versions."""
    cpuinfo, facts = Path("/proc/cpuinfo"), {}
    if cpuinfo.exists():
        first = cpuinfo.read_text().split("\n\n")[0].splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    sizes = [f"L{(cache / 'level').read_text().strip()} {(cache / 'size').read_text().strip()}" for cache in caches]
    versions = {}
    for package in ("safelora-fast", "torch", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": facts.get("model name", platform.processor()),
        "family/model": f"{facts.get('cpu family')}/{facts.get('model')}",
        "caches": ", ".join(sizes),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
        "command": "pytest " + " ".join(arg for arg in sys.argv[1:] if "/tmp" not in arg),
    }


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for suite, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        texts = [[_text(row.get(column, "")) for column in columns] for row in rows]
        widths = [max(len(line[i]) for line in [columns, *texts]) for i in range(len(columns))]
        terminalreporter.section(suite)
        for line in [columns, *texts]:
            terminalreporter.write_line("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        if config.getoption("--record"):
            RESULTS.mkdir(exist_ok=True)
            facts = machine()
            target = RESULTS / f"{suite}-{facts['date']}.csv"
            with target.open("w", newline="") as file:
                writer = csv.DictWriter(file, [*columns, *facts])
                writer.writeheader()
                writer.writerows({**row, **facts} for row in rows)
            terminalreporter.write_line(f"recorded in {target.relative_to(Path.cwd())}")


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `--model`, or a real 135M model, converted from its GGUF file."""
    from safelora_fast.demo.packaged_model import gguf_file, save_from_gguf

    if (given := request.config.getoption("--model")) is not None:
        return Path(given)
    kept = request.config.getoption("--scratch")
    target = Path(kept or tmp_path_factory.mktemp("model")) / "smollm2-135m"
    if not (target / "config.json").exists():
        save_from_gguf(gguf_file(), target)
    return target
