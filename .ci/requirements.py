"""Print the requirements of this package and of the extras named on the command line, one per line.

They are installed before the package itself, so that a change of the code never reinstalls them. With `--oldest` print
the oldest supported versions of what the extras need, torch aside: that is gigabytes, and is not installed twice.
"""

import re
import sys
from pathlib import Path


def main(extras: list[str]) -> None:
    """Print them; tomllib is not in Python 3.10, and pip brings its own tomli."""
    try:
        import tomllib
    except ModuleNotFoundError:
        from pip._vendor import tomli as tomllib
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = "--oldest" in extras
    groups = [project["optional-dependencies"][extra] for extra in extras if extra != "--oldest"]
    if not oldest:
        groups.append(project["dependencies"])
    for requirement in sorted({re.sub(r"\s", "", requirement) for group in groups for requirement in group}):
        if not oldest:
            print(requirement)
        elif not requirement.startswith("torch>"):
            print(re.sub(r">=([\d.]+)", r"==\1.*", requirement))


main(sys.argv[1:])
