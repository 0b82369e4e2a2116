"""Where ``pyvideo`` begins: says in a sentence that the command line's own packages are not installed, if they are not.

The operators need torch alone, so an installation without the ``sampler`` extra has this script and nothing behind it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run `pyvideo_kernels.sampler.cli.main`; exits with 2 where a package that it is written with is missing."""
    try:
        from .cli import main as command
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", __name__.partition(".")[0]):  # a module of ours: a broken installation, not a lean one
            raise
        hint = "pip install 'pyvideo-kernels[sampler]'"
        print(f"error: pyvideo needs {missing}, which is not installed: {hint}", file=sys.stderr)
        sys.exit(2)
    command()


if __name__ == "__main__":
    main()
