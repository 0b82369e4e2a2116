"""Triton kernels, one module an op.

The sources live in the top-level folder ``kernels/`` and are installed into this package. In a checkout (plain or
editable install) that folder is added to this package's search path. It deliberately has no ``__init__.py``: the
top-level name ``kernels`` belongs to Hugging Face's package, and a folder without one never shadows a real package.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
# In site-packages ../../kernels may be Hugging Face's package, so look for a file that only our checkout has.
if (_root / "csrc" / "module.cpp").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
del _root, Path
