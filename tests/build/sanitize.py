"""Runs the tests of the compiled CPU kernels under sanitizers, and as CPUs of lesser instruction sets would.

    python -m tests.build.sanitize [RUN ...] [--jobs N]

    address,undefined   ASan and UBSan, compiled for the best level that this CPU has
    thread              TSan; the work of a call is shared by plain threads, which it understands
    x86-64-v4, x86-64-v3, x86-64
                        the ordinary objects, linked so that they take the CPU for one of that level: the versions of
                        every kernel that this machine would not choose, unsanitized

Every run has its own build and its own copy of the package in build/sanitize; the installed extension is untouched. A
sanitizer first has to report the faults planted for it (csrc/testing/planted.cpp). Any other report fails, as does a
failing test. A run that this machine cannot do is left out and says why: a compiler without the sanitizer's library, a
CPU without the level, another architecture.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time

from tests.build import native_copy
from tests.build.native_copy import EXTENSION, ROOT, Outcome

FOLDER = ROOT / "build" / "sanitize"
LEVELS = {"x86-64-v4": 4, "x86-64-v3": 3, "x86-64": 1}
RUNS = ("address,undefined", "thread", *LEVELS)
# Planted fault -> what its report says.
PLANTED = {
    "address,undefined": {
        "heap_overflow": "AddressSanitizer: heap-buffer-overflow",
        "heap_overflow_write": "AddressSanitizer: heap-buffer-overflow",
        "use_after_free": "AddressSanitizer: heap-use-after-free",
        "signed_overflow": "runtime error: signed integer overflow",
        "misaligned": "runtime error: load of misaligned address",
    },
    "thread": {
        "race": "ThreadSanitizer: data race",
        "race_between_calls": "ThreadSanitizer: data race",
    },
}
RUNTIME_ERROR = re.compile(r"^\S+:\d+:\d+: runtime error: ", re.M)


# What has nothing new for a run: fenced memory is looked at by one thread; memory and order do not depend on the level,
# and the lower levels have no path for AVX-512.
_ONCE = ("--ignore=tests/build/test_native_threads.py", "--ignore=tests/build/test_native_memory.py")
LEFT_OUT = {
    "thread": ("--ignore=tests/build/test_native_bounds.py",),
    "x86-64-v4": _ONCE,
    "x86-64-v3": (*_ONCE, "-k", "not avx512"),
    "x86-64": (*_ONCE, "-k", "not avx512"),
}


class NotHere(Exception):
    """This machine cannot do the run; the message says why."""


class Failed(Exception):
    """The run found something, or could not be done; the second argument is its output."""


def builder():
    """csrc/build_native.py, which is no part of a package."""
    name = "build_native"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "csrc" / "build_native.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def best_level():
    """The level of x86-64 that this CPU has, by what torch found; "" on another architecture."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}.get(capability, "x86-64")


def options(run, reports):
    """Environment of a sanitizer: its library before all others, its reports in ``reports``."""
    log = f"log_path={reports}/report"
    return {
        # Python and torch free little at their end, and that is theirs.
        "ASAN_OPTIONS": f"{log}:detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": f"{log}:print_stacktrace=1",
        # Python and torch were not built for TSan: of what they do it sees single library calls, and no order.
        "TSAN_OPTIONS": f"{log}:ignore_noninstrumented_modules=1:history_size=4",
        # Parts of unequal size; and ASan sees torch's own threads.
        "OMP_NUM_THREADS": "3" if run == "thread" else "2",
    }


def start(libraries, environment):
    """What to put before Python's command; NotHere where Python does not start under these libraries."""
    preload = ["env", f"LD_PRELOAD={':'.join(map(str, libraries))}"]
    said = ""
    # TSan wants its addresses where a kernel that randomises more bits of them may have put something.
    for prefix in (preload, ["setarch", platform.machine(), "-R", *preload]):
        if shutil.which(prefix[0]) is None:
            continue
        done = subprocess.run([*prefix, sys.executable, "-c", "import torch"], capture_output=True, text=True,
                              env=os.environ | environment, check=False)  # fmt: skip
        if done.returncode == 0:
            return prefix
        said = said or (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    raise NotHere(f"Python does not start with {libraries[0].name}: {said}")


def collect(reports, output):
    """The reports there are, by the process that wrote them (0: in the output), and no more thereafter."""
    found = {}
    for path in sorted(reports.glob("report.*")):
        found[int(path.suffix[1:])] = path.read_text(errors="replace")
        path.unlink()
    # GCC's UBSan beside its ASan writes to stderr whatever its options say.
    if RUNTIME_ERROR.search(output):
        found[0] = output[RUNTIME_ERROR.search(output).start() :][:20_000]
    return found


def check_planted(run, copy, reports, **how):
    """Failed unless each fault planted for ``run`` was reported as what it is."""
    done = native_copy.python(copy, "-m", "tests.build.planted", *PLANTED[run], **how)
    # What a child wrote stands before the line with its name.
    parts = re.split(r"^planted: (\w+) (\d+)$", done.stdout, flags=re.M)
    written = {name: (int(pid), text) for text, name, pid in zip(parts[::3], parts[1::3], parts[2::3])}
    said = collect(reports, "")
    for fault, words in PLANTED[run].items():
        pid, text = written.get(fault, (0, ""))
        if words not in text + said.get(pid, ""):
            raise Failed(f"the planted fault {fault!r} was not reported", done.stdout + "".join(said.values()))


def sanitized(run):
    build, folder = builder(), FOLDER / run.replace(",", "-")
    reports, copy = folder / "reports", folder / "checkout"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    try:
        libraries = build.sanitizer_runtime(run)
    except build.BuildError as error:
        raise NotHere(str(error)) from error
    how = {"prefix": start(libraries, options(run, reports)), "environment": options(run, reports)}
    # TSan at the lowest level: a race is one at every level, and kernels chosen at run time are there all the same.
    march = best_level() if run != "thread" else ""
    began = time.monotonic()
    info = build.build(folder / EXTENSION, folder / "objects", "none", sanitize=run, march=march)
    if not info.native:
        raise Failed(f"it does not build: {info.why_not}", "")
    built = time.monotonic() - began
    native_copy.make(copy, folder / EXTENSION)
    check_planted(run, copy, reports, **how)
    outcome = native_copy.run_tests(copy, *LEFT_OUT.get(run, ()), **how)
    if said := collect(reports, outcome.output):
        raise Failed(f"{len(said)} reports of the sanitizer", outcome.output + "\n" + "\n".join(said.values()))
    outcome.summary = f"built in {built:.0f} s, {len(PLANTED[run])} planted faults reported; {outcome.summary}"
    return outcome


def objects():
    """Folder with the ordinary build's objects: the installation's where they are those of this source, else built."""
    build, installed = builder(), ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    if (installed / "build.ninja").is_file():
        done = subprocess.run(
            [*build._ninja(), "-C", str(installed), "-n"], capture_output=True, text=True, check=False
        )
        if "no work to do" in done.stdout:
            return installed
    own = FOLDER / "plain"
    info = build.build(own / EXTENSION, own / "objects", "none")
    if not info.native:
        raise NotHere(info.why_not)
    return own / "objects"


def at_level(level, folder_of_objects):
    build, folder = builder(), FOLDER / level
    best = best_level()
    if not best:
        raise NotHere(f"the levels of x86-64 are not those of {platform.machine()}")
    if LEVELS[level] > LEVELS[best]:
        raise NotHere(f"this CPU is of level {best}")
    folder.mkdir(parents=True, exist_ok=True)
    stub, extension = folder / "cpu_level.o", folder / EXTENSION
    compiler = build.find_compiler()
    version = build._output(*compiler, "-dumpversion").partition(".")[0]
    if build._is_clang(compiler) or not version.isdigit() or int(version) < 12:
        raise NotHere("__builtin_cpu_supports knows the levels of x86-64 in GCC 12 and newer")
    listed = subprocess.run([*build._ninja(), "-C", str(folder_of_objects), "-t", "commands"],
                            capture_output=True, text=True, check=True)  # fmt: skip
    command = shlex.split(listed.stdout.splitlines()[-1])
    command[command.index("-o") + 1] = str(extension)
    source = ROOT / "csrc" / "testing" / "cpu_level.cpp"
    for step in (
        [*compiler, "-O1", "-fPIC", f"-DPYVIDEO_LEVEL={LEVELS[level]}", "-c", str(source), "-o", str(stub)],
        [*command, str(stub), "-Wl,--wrap=__cpu_indicator_init"],
    ):
        done = subprocess.run(step, cwd=folder_of_objects, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed("it does not link", shlex.join(step) + "\n" + done.stderr)
    copy = folder / "checkout"
    native_copy.make(copy, extension)
    taken, output = native_copy.level(copy)
    if taken != level:
        raise Failed(f"the extension takes this CPU for {taken or 'nothing'}", output)
    return native_copy.run_tests(copy, *LEFT_OUT[level], environment={"OMP_NUM_THREADS": "2"})


def do(run, folder_of_objects):
    """One run's line and whether it passed; what it found is printed under it."""
    began = time.monotonic()
    try:
        outcome = at_level(run, folder_of_objects()) if run in LEVELS else sanitized(run)
    except NotHere as why:
        return f"{run}: not done: {why}", True
    except Failed as error:
        outcome = Outcome("", *error.args)
    text = f"{run}: {outcome.failure or 'passed'} ({time.monotonic() - began:.0f} s; {outcome.summary or 'no tests'})"
    log = FOLDER / f"{run.replace(',', '-')}.log"
    log.write_text(outcome.output)
    if outcome.failure:
        text += f"\n{outcome.output[-8000:]}\nall of it: {log}"
    return text, not outcome.failure


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; all where none is named")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    given = parser.parse_args(arguments)
    if unknown := set(given.runs) - set(RUNS):
        parser.error(f"there are the runs {', '.join(RUNS)}; got {', '.join(sorted(unknown))}")
    runs = [run for run in RUNS if run in (given.runs or RUNS)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Each run has a core.
    os.environ.setdefault("MAX_JOBS", str(max(1, len(os.sched_getaffinity(0)) // given.jobs)))
    builder()  # before there are threads: a second one would find the module half loaded
    lock = threading.Lock()

    @functools.cache
    def once():
        return objects()

    def folder_of_objects():
        with lock:
            return once()

    passed = True
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(do, run, folder_of_objects) for run in runs]):
            text, good = done.result()
            print(text, flush=True)
            passed &= good
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
