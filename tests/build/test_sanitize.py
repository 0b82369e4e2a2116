"""tests/build/sanitize.py without its builds: what it selects, what makes a run fail, and what only leaves one out."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.build import native_copy, sanitize
from tests.build.native_copy import Outcome, reaches_kernels

PLANTED_SOURCE = (sanitize.ROOT / "csrc" / "testing" / "planted.cpp").read_text()


@pytest.mark.parametrize(
    "path, name, parameters, chosen",
    [
        ("tests/build/test_native.py", "test_samples[rms_norm]", {"name": "rms_norm"}, True),
        ("tests/build/test_native_threads.py", "test_at_once", {}, True),
        ("tests/build/test_native.py", "test_contract[unipc_step]", {"name": "unipc_step"}, False),
        ("tests/build/test_build.py", "test_wheel_contents", {}, False),
        ("tests/ops/test_rms_norm.py", "test_matches[cpu-f]", {"impl": "cpu", "device": "cpu"}, True),
        ("tests/ops/test_rms_norm.py", "test_matches[triton-cpu-f]", {"impl": "triton", "device": "cpu"}, False),
        ("tests/ops/test_rms_norm.py", "test_fullgraph[cpu]", {"impl": "cpu"}, False),
        ("tests/ops/test_configs.py", "test_rule[cpu]", {"arch": "cpu"}, True),
        ("tests/ops/test_configs.py", "test_rule[sm_90]", {"arch": "sm_90"}, False),
        ("tests/ops/test_spacetime_attention_cpu.py", "test_windows", {}, True),
        ("tests/sampler/test_loop.py", "test_loop[cpu]", {"impl": "cpu"}, False),
    ],
)  # fmt: skip
def test_which_tests_reach_compiled_kernels(path, name, parameters, chosen):
    assert reaches_kernels(Path(path), name, parameters) is chosen


def test_every_planted_fault_is_asked_for_and_exists():
    there = set(re.findall(r'm\.def\("(\w+)\(', PLANTED_SOURCE))
    assert there == {name for faults in sanitize.PLANTED.values() for name in faults}
    assert set(sanitize.PLANTED) | set(sanitize.LEVELS) == set(sanitize.RUNS)


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """``planted(reports={name: text}, output={name: text})``: a sanitizer that said so about the planted faults."""

    def run(reports=(), output=()):
        text = ""
        for pid, name in enumerate(sanitize.PLANTED["address,undefined"], start=100):
            if name in reports:
                (tmp_path / f"report.{pid}").write_text(reports[name])
            text += f"{dict(output).get(name, '')}\nplanted: {name} {pid}\n"
        monkeypatch.setattr(native_copy, "python", lambda *_, **__: subprocess.CompletedProcess([], 0, text))
        sanitize.check_planted("address,undefined", tmp_path, tmp_path)

    return run


def test_a_planted_fault_that_is_not_reported_fails(planted, tmp_path):
    words = dict(sanitize.PLANTED["address,undefined"])
    ours = {name: f"==1==ERROR: {text} on address" for name, text in words.items() if "runtime" not in text}
    stderr = {name: f"x.cpp:1:2: {text}: 3 + 4" for name, text in words.items() if "runtime" in text}
    planted(ours, stderr)
    assert not list(tmp_path.iterdir()), "a report of a planted fault must not be taken for one of a kernel"
    for missing in words:
        with pytest.raises(sanitize.Failed, match=f"'{missing}' was not reported"):
            planted({k: v for k, v in ours.items() if k != missing}, {k: v for k, v in stderr.items() if k != missing})
    # One fault's report does not stand for another's.
    with pytest.raises(sanitize.Failed, match="'use_after_free' was not reported"):
        planted(ours | {"use_after_free": ours["heap_overflow"]}, stderr)


def test_reports_are_found_in_files_and_in_the_output(tmp_path):
    assert sanitize.collect(tmp_path, "a test said runtime error: nothing of ours\n") == {}
    (tmp_path / "report.12").write_text("WARNING: ThreadSanitizer: data race")
    said = sanitize.collect(tmp_path, "tests/x.py::test_y \ncsrc/a.cpp:3:14: runtime error: signed integer overflow\n")
    assert said[12].startswith("WARNING") and said[0].startswith("csrc/a.cpp:3:14")
    assert sanitize.collect(tmp_path, "") == {}


@pytest.fixture
def sanitized(monkeypatch, tmp_path):
    """A run under TSan whose build, start and planted faults are in order, and whose tests do as they are told."""

    class Build:
        BuildError = sanitize.builder().BuildError
        native = True
        why_not = ""

        def sanitizer_runtime(self, run):
            return [Path("/lib/libtsan.so")]

        def build(self, *_, **__):
            return self

    build = Build()
    monkeypatch.setattr(sanitize, "FOLDER", tmp_path)
    monkeypatch.setattr(sanitize, "builder", lambda: build)
    monkeypatch.setattr(sanitize, "start", lambda *_: [])
    monkeypatch.setattr(sanitize, "check_planted", lambda *_, **__: None)
    monkeypatch.setattr(native_copy, "make", lambda *_: None)

    def run(outcome, report=""):
        def tests(copy, *_, **how):
            if report:
                (copy.parent / "reports" / "report.7").write_text(report)
            return outcome

        monkeypatch.setattr(native_copy, "run_tests", tests)
        return sanitize.do("thread", None)

    run.build = build
    return run


def test_a_run_fails_by_a_report_a_test_or_a_build(sanitized):
    text, good = sanitized(Outcome("9 passed"))
    assert good and text.startswith("thread: passed") and "2 planted faults reported; 9 passed" in text
    text, good = sanitized(Outcome("9 passed"), "WARNING: ThreadSanitizer: data race in rms_norm")
    assert not good and "1 reports of the sanitizer" in text and "data race in rms_norm" in text
    text, good = sanitized(Outcome("1 failed", "the tests failed (exit status 1)", "assert 1 == 2"))
    assert not good and "the tests failed" in text and "assert 1 == 2" in text
    sanitized.build.native, sanitized.build.why_not = False, "compilation failed: x"
    text, good = sanitized(Outcome("9 passed"))
    assert not good and "it does not build: compilation failed: x" in text


def test_what_a_machine_cannot_do_is_said_and_passes(sanitized, monkeypatch):
    def missing(run):
        raise sanitized.build.BuildError("g++ has no libtsan.so")

    monkeypatch.setattr(sanitized.build, "sanitizer_runtime", missing, raising=False)
    assert sanitized(Outcome("9 passed")) == ("thread: not done: g++ has no libtsan.so", True)
    monkeypatch.setattr(sanitize, "best_level", lambda: "x86-64-v3")
    assert sanitize.do("x86-64-v4", Path) == ("x86-64-v4: not done: this CPU is of level x86-64-v3", True)
    monkeypatch.setattr(sanitize, "best_level", lambda: "")
    text, good = sanitize.do("x86-64", Path)
    assert good and "the levels of x86-64 are not those of" in text


@pytest.mark.parametrize(
    "name, version", [("g++ 11.4.0", "11"), ("Debian clang version 14.0.6", "14.0.6"), ("g++", "")]
)
def test_levels_want_a_compiler_that_names_them(monkeypatch, tmp_path, name, version):
    compiler = tmp_path / "cxx"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {name} || echo {version}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(sanitize, "FOLDER", tmp_path)
    monkeypatch.setattr(sanitize, "best_level", lambda: "x86-64-v4")
    text, good = sanitize.do("x86-64-v3", lambda: tmp_path)
    assert good and "not done: __builtin_cpu_supports knows the levels of x86-64 in GCC 12 and newer" in text


def test_python_that_does_not_start_under_a_library_is_said(monkeypatch, tmp_path):
    (library := tmp_path / "libasan.so").write_bytes(b"\x7fELF")
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: name if name == "env" else None)
    done = subprocess.CompletedProcess([], 1, "", "FATAL: ThreadSanitizer: unexpected memory mapping")
    monkeypatch.setattr(sanitize.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(sanitize.NotHere, match=r"does not start with libasan.so: FATAL: .* memory mapping"):
        sanitize.start([library], {})


def test_an_unknown_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        sanitize.main(["memory"])
    assert "address,undefined, thread, x86-64-v4" in capsys.readouterr().err
