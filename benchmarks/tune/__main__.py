"""``python -m benchmarks.tune``."""

import sys

from pyvideo_kernels.benchmarks.tune.run import main

if __name__ == "__main__":
    sys.exit(main())
