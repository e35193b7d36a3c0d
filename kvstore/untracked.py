"""Objects that the garbage collector need not look at.

It looks at every object that could be part of a circle, and everybody waits for it: 7 us for an entry of two tensors
and what is known of it, so seconds for a million. What the store holds refers to nothing that leads back to it, so the
count of references alone frees it, and at once. (bench/lock_hold.py measures a collection.)
"""

import ctypes
import gc

_untrack = ctypes.pythonapi.PyObject_GC_UnTrack
_untrack.argtypes = [ctypes.py_object]
_untrack.restype = None


def untrack(*held: object) -> None:
    """Have the collector forget objects: of classes of ours, dicts, or tensors, that no circle leads through.

    The types of these take themselves out of the collector's list only if they are in it. Others may not look first:
    a mappingproxy that is not in it ends the process.
    """
    for x in held:
        if gc.is_tracked(x):
            _untrack(x)
