"""What an op is measured against: the model's eager code, that code compiled, and external kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pyvideo_kernels.error_types import ValueOptionError
from pyvideo_kernels.sampler.problems import did_you_mean

from ..peers import Peer, peers_for
from ..registry import Entry

Inputs = dict[str, Any]
OWN = ("eager", "compile")


@dataclass(frozen=True)
class Baseline:
    """One competitor, ready to be called.

    Args:
        call: prepared inputs -> outputs shaped like our op's.
        prepare: inputs -> what ``call`` takes; once, untimed.
        facts: what the row says of it beside the times (version, note, graph breaks).
    """

    call: Callable[[Inputs], Any]
    prepare: Callable[[Inputs], Inputs]
    facts: dict[str, Any]


def eager(entry: Entry) -> Baseline:
    return Baseline(lambda inputs: entry.eager(**inputs), entry.stock, {})


def compiled(entry: Entry, inputs: Inputs) -> tuple[Baseline, Any]:
    """The eager code through ``torch.compile``, and what it returns for ``inputs``: compilation happens here."""
    # The compiler gives up on a function it has seen at many sizes, and would go on in eager without a word.
    torch.compiler.reset()
    prepared = entry.stock(inputs)
    facts: dict[str, Any] = {}
    try:
        function = torch.compile(entry.eager, dynamic=False, fullgraph=True)
        output = function(**prepared)
    except torch._dynamo.exc.Unsupported:
        torch.compiler.reset()
        function = torch.compile(entry.eager, dynamic=False)
        output = function(**prepared)
        facts["note"] = "graph breaks"
    return Baseline(lambda given: function(**given), entry.stock, facts), output


def external(peer: Peer) -> Baseline:
    assert peer.call is not None
    facts = {"version": peer.version, **({"note": peer.note} if peer.note else {})}
    return Baseline(peer.call, peer.prepare, facts)


def peers(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Peer]:
    """The external kernels for an op; an in-place op has those of its twin (none of them writes in place)."""
    return peers_for(op.removesuffix("_"), device, dtype)


def chosen(
    wanted: Iterable[str] | None, ops: Iterable[str], device: torch.device, dtype: torch.dtype
) -> tuple[str, ...] | None:
    """The baselines asked for, checked by name; None: all there are.

    Raises:
        ValueOptionError: a name that no op here knows.
    """
    if wanted is None:
        return None
    known = [*OWN, *dict.fromkeys(name for op in ops for name in peers(op, device, dtype))]
    for name in (names := tuple(dict.fromkeys(wanted))):
        if name not in known:
            raise ValueOptionError(
                f"baseline: must be one of {', '.join(known)}; got {name!r}{did_you_mean(name, known)}"
            )
    return names
