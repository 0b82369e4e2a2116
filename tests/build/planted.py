"""Calls the faults planted in a sanitizer build, each in a child of its own: python -m tests.build.planted NAME ...

Prints "planted: NAME PID" after each; what the sanitizer says goes where its options send it.
"""

import importlib
import os
import sys
import threading

import torch


def call(name):
    fault, x = getattr(torch.ops.pyvideo_planted, name), torch.ones(3)
    if name != "race_between_calls":
        return fault(x)
    threads = [threading.Thread(target=fault, args=(x.clone(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main():
    importlib.import_module("pyvideo_kernels._C")
    for name in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            call(name)
            os._exit(0)
        os.waitpid(child, 0)
        print("\nplanted:", name, child, flush=True)


if __name__ == "__main__":
    main()
