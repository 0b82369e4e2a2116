"""What is measured: per op the models' shapes, inputs, the bytes and FLOPs that must move, and the eager code.

Bytes count each input once and each output once, FLOPs a multiply and an add as two. A shape with ``style`` follows
another model's code than Wan's. The entries are in ``entries/``.
"""

from __future__ import annotations

from .entries import attention, sampler, transformer, vae, vae_conv, vae_ends, vae_norms
from .entries.entry import Entry as Entry
from .entries.entry import moved_bytes as moved_bytes
from .entries.entry import weight_of as weight_of

ENTRIES: dict[str, Entry] = {
    entry.op: entry
    for group in (transformer, attention, vae, vae_conv, vae_ends, vae_norms, sampler)
    for entry in group.ENTRIES
}
