"""Inputs made of others: bytes changed here and there, and messages of a proto with anything in their fields."""

import random

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**64 - 1)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to sixteen changes: bits flipped, bytes cut, added, repeated, or made an interesting number."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + rng.choice((1, 2, 4, 8))] = b""
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8)))
        elif kind == 3:
            width = rng.choice((1, 2, 4, 8))
            out[at : at + width] = (rng.choice(INTERESTING) % 256**width).to_bytes(width, "little")
        elif kind == 4:
            out[at:] = out[at : rng.randrange(at, len(out) + 1)]
        else:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.randrange(32)]
    return bytes(out)


_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: 31,
    FieldDescriptor.CPPTYPE_INT64: 63,
    FieldDescriptor.CPPTYPE_UINT32: 32,
    FieldDescriptor.CPPTYPE_UINT64: 64,
}
_NUMBERS = (0.0, 1.0, -1.0, 0.5, 60.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "x", "k", "model@1", "nf4-kv", "nf4-kv2", "layers", "..", "a" * 300, "\u202e", "\x00")


def message(made: Message, rng: random.Random, pool: list[bytes], depth: int = 0) -> Message:
    """Fill a message: each field with one chance in two, bytes mostly out of a pool of keys that are in use."""
    for field in made.DESCRIPTOR.fields:
        if rng.random() < 0.5:
            continue
        if not field.is_repeated:
            _set(made, field, rng, pool, depth)
            continue
        held = getattr(made, field.name)
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
                held.append(_value(field, rng, pool))
            elif field.message_type.GetOptions().map_entry:
                of_key, of_value = field.message_type.fields
                held[_value(of_key, rng, pool)] = _value(of_value, rng, pool)
            elif depth < 4:
                message(held.add(), rng, pool, depth + 1)
    return made


def _set(made: Message, field: FieldDescriptor, rng: random.Random, pool: list[bytes], depth: int) -> None:
    if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
        setattr(made, field.name, _value(field, rng, pool))
    elif depth < 4:
        inner = getattr(made, field.name)
        inner.SetInParent()
        message(inner, rng, pool, depth + 1)


def _value(field: FieldDescriptor, rng: random.Random, pool: list[bytes]) -> object:
    kind = field.cpp_type
    if kind in _WHOLE:
        return (rng.choice(INTERESTING) if rng.random() < 0.3 else rng.randrange(40)) % (1 << _WHOLE[kind])
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice((0, 1, 2, 5, 30, 99))
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return rng.choice(_NUMBERS)
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(_TEXTS)
    return rng.choice(pool) if rng.random() < 0.9 else rng.randbytes(rng.choice((0, 1, 16, 512, 600)))
