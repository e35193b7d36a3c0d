"""Objects that the garbage collector need not look at.

It looks at every object that could be part of a circle, and everybody waits for it: 7 us for an entry of two tensors
and what is known of it, so seconds for a million. What the store holds refers to nothing that leads back to it, so the
count of references alone frees it, and at once. (bench/lock_hold.py measures a collection.)
"""

import ctypes
import gc
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.entries.entry import EncodedTensor, Entry

_is_tracked = gc.is_tracked
_untrack = ctypes.pythonapi.PyObject_GC_UnTrack
_untrack.argtypes = [ctypes.py_object]
_untrack.restype = None


def untrack(*held: object) -> None:
    """Have the collector forget objects: of classes of ours, dicts, or tensors, that no circle leads through.

    The types of these take themselves out of the collector's list only if they are in it. Others may not look first:
    a mappingproxy that is not in it ends the process.
    """
    for x in held:
        if _is_tracked(x):
            _untrack(x)


def untrack_held(held: Iterable[tuple["Entry", object]]) -> None:
    """`untrack` of entries that a tier is to hold, with what is in them, each with what the store knows of its key."""
    for entry, meta in held:
        untrack(entry, meta, *_within(entry.tensors))


def untrack_tensors(tensors: "Mapping[str, EncodedTensor]") -> None:
    """`untrack` of an entry's tensors."""
    untrack(*_within(tensors))


def _within(tensors: "Mapping[str, EncodedTensor]") -> list[object]:
    """What the collector would look at. A mapping that makes its tensors when they are asked for is not asked."""
    if isinstance(tensors, MappingProxyType):
        return []
    found: list[object] = [tensors]
    if isinstance(tensors, dict):
        for tensor in tensors.values():
            parts = tensor.parts
            found += (tensor, tensor.spec, *parts.values())
            if isinstance(parts, dict):
                found.append(parts)
    return found
