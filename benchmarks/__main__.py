"""``python -m benchmarks``: what ``make bench`` runs."""

import sys

from pyvideo_kernels.benchmarks.ops import main

if __name__ == "__main__":
    sys.exit(main())
