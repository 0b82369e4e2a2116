"""The benchmarks, as a package: ``pyvideo bench`` runs from here.

The sources live in the top-level folder ``benchmarks/`` and are installed into this package. In a checkout (plain or
editable install) that folder is this package's search path. Import its modules by this name alone: as
``benchmarks.registry`` a module would be loaded a second time.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "csrc" / "module.cpp").is_file() and (_root / "benchmarks" / "registry.py").is_file():
    __path__.append(str(_root / "benchmarks"))
del _root, Path
