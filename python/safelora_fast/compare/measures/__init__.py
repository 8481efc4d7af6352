"""What can be measured on a run, one file each.

Every file of this folder is imported, and its measure registers itself (see :class:`Measure`): no list names them.
"""

from importlib import import_module
from pkgutil import iter_modules

from safelora_fast.compare.measures.base import Measure as Measure
from safelora_fast.compare.measures.base import registered

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
MEASURES = registered()
