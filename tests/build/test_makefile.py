"""make film: any prompt reaches the command untouched, and what is missing is said in one sentence."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

if shutil.which("make") is None:
    pytest.skip("make is not installed", allow_module_level=True)


@pytest.fixture
def checkout(tmp_path):
    """The Makefile with an environment that is set up already, whose `pyvideo` prints its arguments."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "MANIFEST.in", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = tmp_path / ".venv" / "bin" / "pyvideo"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\nfor a; do printf "[%s]\\n" "$a"; done\n')
    command.chmod(0o755)
    for age, name in enumerate((".installed", ".deps-constraints.txt", "pyvenv.cfg")):
        (command.parents[1] / name).touch()
        later = time.time() + 60 - age
        os.utime(command.parents[1] / name, (later, later))
    return tmp_path


def make(folder, *arguments, **environment):
    plain = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PROMPT", "OUTPUT")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=plain | environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("prompt", ["a red ball", 'it\'s a "big" $HOME `id` $(pwd) ${x} # \\n %s; false', "-x --help"])
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_prompt_arrives_untouched(checkout, prompt, way):
    done = make(checkout, "film", f"PROMPT={prompt}") if way == "argument" else make(checkout, "film", PROMPT=prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[sample]", "[--output]", "[film.mp4]", "[--]", f"[{prompt}]"]


def test_no_prompt_says_how(checkout):
    done = make(checkout, "film")
    assert done.returncode != 0 and 'make film PROMPT="a red ball' in done.stderr and not done.stdout


def test_an_old_python_is_refused(checkout):
    shutil.rmtree(checkout / ".venv")
    old = checkout / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.10.2; exit; }\nexit 1\n')
    old.chmod(0o755)
    done = make(checkout, "setup", f"PYTHON={old}")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr and "is Python 3.10.2" in done.stderr
    assert not (checkout / ".venv").exists()


def test_the_constraints_pin_a_supported_pair():
    pairs = {"constraints.txt": ("2.13.0", "3.7.1"), "constraints-torch2.11.txt": ("2.11.0", "3.6.0")}
    for name, (torch, triton) in pairs.items():
        lines = (ROOT / name).read_text().splitlines()
        pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
        assert (pinned["torch"], pinned["triton"]) == (torch, triton)
        assert pinned["diffusers"] == "0.42.1"
