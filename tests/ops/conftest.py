"""Fixtures of the tests that hand attention to a library."""

import sys

import pytest
import torch

from pyvideo_kernels import dispatch, verdicts
from pyvideo_kernels.ops import attention_libraries as libraries
from pyvideo_kernels.ops import flash_attention as flash

from .library_standins import FlashModule


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """No library, no card, no records; as in a fresh process."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "flash_attn_3"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verdicts, "VERIFIED", tmp_path / "verified.json")
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(flash, "_version", lambda distribution: None)
    flash.forget()
    libraries.forget()
    yield
    flash.forget()
    libraries.forget()


@pytest.fixture
def card(no_library, monkeypatch):
    """Takes the CPU for a card of an architecture: ``card("sm_90")``; a real one is left alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def be(arch):
        monkeypatch.setattr(dispatch, "arch_of", lambda device: arch)
        libraries.forget()

    be("sm_90")
    return be


@pytest.fixture
def install(no_library, monkeypatch):
    def put(kind):
        if kind == "4":
            monkeypatch.setitem(sys.modules, "flash_attn", FlashModule("flash_attn", "4"))
        name = "flash_attn.cute" if kind == "4" else "flash_attn_interface"
        module = FlashModule(name, kind)
        monkeypatch.setitem(sys.modules, name, module)
        flash.forget()
        return module

    return put
