"""Print the requirements of this package and of the extras named on the command line, one per line.

They are installed before the package itself, so that a change of the code never reinstalls them.
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
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    for requirement in sorted({requirement for group in groups for requirement in group}):
        print(re.sub(r"\s", "", requirement))


main(sys.argv[1:])
