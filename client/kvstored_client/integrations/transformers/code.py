"""Which code a model's modules run: digests of bytecode, so that a replaced function is noticed in any process.

A function is its own bytecode, that of what it wraps, and that of the functions of its module that it calls by name:
`LlamaAttention.forward = mine` and `modeling_llama.apply_rotary_pos_emb = mine` are the two usual ways of patching.
Digests are kept for as long as the very same functions stand there.
"""

import functools
import hashlib
import inspect
import types
from typing import Any

import xxhash

_classes: dict[type, tuple[tuple[Any, ...], str]] = {}


def of_class(cls: type) -> str:
    """A module's class: its name and the code of its forward."""
    forward = getattr(cls, "forward", None)
    used = _used(forward)
    known = _classes.get(cls)
    if known is not None and len(known[0]) == len(used) and all(map(_same, known[0], used)):
        return known[1]
    text = f"{cls.__module__}.{cls.__qualname__}:{_digest(used)}"
    _classes[cls] = (used, text)
    return text


def of_function(function: Any) -> str:
    """A function: its name and its code."""
    return f"{function.__module__}.{function.__qualname__}:{_digest(_used(function))}"


def of_attention(config: Any) -> str:
    """The attention function that a configuration names, where one is registered under that name."""
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, None)  # noqa: SLF001 - where transformers itself looks
    except (ImportError, AttributeError, TypeError):
        return ""
    return of_function(function) if isinstance(function, types.FunctionType) else ""


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, str) and a == b)


def _used(function: Any) -> tuple[Any, ...]:
    """The code objects behind a function: its own, those it wraps, and of functions that it names."""
    found: list[Any] = []
    while function is not None:
        plain = getattr(function, "__func__", function)
        if isinstance(plain, types.FunctionType):
            found.append(plain.__code__)
            names = plain.__globals__
            for name in plain.__code__.co_names:
                other = names.get(name)
                if isinstance(other, types.FunctionType):
                    found.append(inspect.unwrap(other).__code__)
        else:
            found.append(f"{type(plain).__module__}.{type(plain).__qualname__}")
        function = getattr(plain, "__wrapped__", None)
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def _digest(used: tuple[Any, ...]) -> str:
    found = hashlib.sha256()
    for piece in used:
        found.update(_code(piece).encode() if isinstance(piece, types.CodeType) else str(piece).encode())
    return found.hexdigest()[:16]


def _code(piece: types.CodeType) -> str:
    """Bytecode with its constants and names; not where it stands in a file."""
    constants = [_constant(x) for x in piece.co_consts]
    return str(xxhash.xxh3_128_hexdigest(f"{piece.co_code.hex()} {piece.co_names} {constants}".encode()))


def _constant(x: Any) -> str:
    if isinstance(x, types.CodeType):
        return _code(x)
    # A set's order is another in each process.
    return str(sorted(map(repr, x))) if isinstance(x, frozenset) else repr(x)
