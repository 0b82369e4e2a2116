"""``python -m benchmarks.campaign``."""

import sys

from pyvideo_kernels.benchmarks.campaign.run import main

if __name__ == "__main__":
    sys.exit(main())
