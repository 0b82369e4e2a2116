"""Reads the CUDA machine code inside a built extension and says what is wrong with it; needs no GPU.

    python -m tests.build.sass pyvideo_kernels/_C*.so --archs "80;90a;100a;120a"

Every kernel must keep its values in registers (no local memory, no stack). A kernel whose name says it is vectorised
must load and store in 16-byte accesses.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

# Kernel template -> index of its `vectorised` bool among the bool arguments.
VECTOR_FLAG = {"guidance_step_kernel": 1}


def _cuobjdump(*arguments):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout


def functions(text):
    """Mangled name -> its SASS."""
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def is_vectorised(name):
    for template, index in VECTOR_FLAG.items():
        if template in name:
            return re.findall(r"Lb([01])E", name)[index] == "1"
    return False


def judge(sass, usage):
    """Problems of one architecture's code: ``sass`` by function, ``usage`` the text of -res-usage."""
    problems = []
    for name, code in sass.items():
        if local := len(re.findall(r"\b(?:LDL|STL)\b", code)):
            problems.append(f"{name}: {local} local-memory instructions")
        if is_vectorised(name):
            problems += [
                f"{name}: no 16-byte {what}"
                for what, pattern in (("load", r"\bLDG\.E(?:\.\w+)*\.128\b"), ("store", r"\bSTG\.E(?:\.\w+)*\.128\b"))
                if not re.search(pattern, code)
            ]
    for name, stack in re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", usage):
        if stack != "0":
            problems.append(f"{name}: {stack} bytes of stack")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("--archs", required=True, help='"80;90a"')
    options = parser.parse_args()
    failed = False
    for arch in options.archs.split(";"):
        sass = functions(_cuobjdump("-sass", "-arch", f"sm_{arch}", options.library))
        usage = _cuobjdump("-res-usage", "-arch", f"sm_{arch}", options.library)
        registers = [int(n) for n in re.findall(r"REG:(\d+)", usage)]
        problems = judge(sass, usage) if sass and registers else ["no machine code for this architecture"]
        failed |= bool(problems)
        wide = sum(is_vectorised(name) for name in sass)
        good = f"{len(sass)} kernels, {wide} vectorised, at most {max(registers, default=0)} registers, nothing spilled"
        print(f"sm_{arch}: {'; '.join(problems) or good}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
