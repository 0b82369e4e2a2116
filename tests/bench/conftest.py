"""Stand-ins for packages and cards that a test machine does not have."""

import importlib.machinery
import sys
import types

import pytest
import torch

from pyvideo_kernels.benchmarks.peers import package as peer


@pytest.fixture
def h100(monkeypatch):
    """A machine whose first card is an sm_90, as far as adapters of peers ask."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.fixture
def install(monkeypatch):
    """Put stand-ins for packages in place: ``install("natten", "0.21.6", {"natten": {"attention": f}})``."""
    peer._find.cache_clear()
    versions, fakes = {}, set()
    monkeypatch.setattr(peer, "installed", versions.get)
    monkeypatch.setattr(peer, "_importable", fakes.__contains__)  # whatever this machine has

    def put(distribution, version, modules):
        if version is not None:
            versions[distribution] = version
        for name, attributes in modules.items():
            for depth in range(1, name.count(".") + 2):
                path = ".".join(name.split(".")[:depth])
                fakes.add(path)
                if path not in modules and path in sys.modules:
                    continue
                module = types.ModuleType(path)
                module.__spec__ = importlib.machinery.ModuleSpec(path, None)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, path, module)
            for attribute, value in attributes.items():
                setattr(sys.modules[name], attribute, value)

    yield put
    peer._find.cache_clear()
