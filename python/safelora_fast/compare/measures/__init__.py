"""The measures that can be taken on a run, one file each.

Importing this package imports every file in it, and each measure registers itself (see :class:`Measure`).
"""

from importlib import import_module
from pkgutil import iter_modules

from safelora_fast.compare.measures.base import Measure as Measure
from safelora_fast.compare.measures.base import registered

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
MEASURES = registered()
