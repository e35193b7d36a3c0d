"""Hints to a codec about a tensor, in addition to its values: its role and its layout.

Hints change which bytes are written, never whether they decode: a codec stores what decoding needs as
attributes. Without hints the role comes from the name, and the layout is (layers, tokens, heads, dim).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["key", "value", "packed", "plain"]

_ROLES: dict[str, Role] = {
    "k": "key",
    "key": "key",
    "keys": "key",
    "v": "value",
    "value": "value",
    "values": "value",
    "kv": "packed",
}


@dataclass(frozen=True, slots=True)
class Hints:
    """role: None means by name. token_axis: -3 for (layers, tokens, heads, dim), -2 for (..., tokens, dim).

    None means by shape (`token_axis_of`). prefix_start: whether the first token is the first of a prompt; None means it
    may be. position: that of the first token, as RoPE counts it; None: unknown. decoded: whether these values were
    decoded from a lossy form.
    """

    role: Role | None = None
    token_axis: int | None = None
    prefix_start: bool | None = None
    position: int | None = None
    decoded: bool = False


NO_HINTS = Hints()


def role_of(name: str, hints: Hints) -> Role:
    """The hinted role, or the role in the name: the last of its parts ("layers.3.k") that is a known word."""
    if hints.role is not None:
        return hints.role
    for part in reversed(name.split(".")):
        if part.lower() in _ROLES:
            return _ROLES[part.lower()]
    return "plain"


def token_axis_of(shape: Sequence[int], hints: Hints) -> int:
    """The hinted axis, or where the tokens probably are: (..., tokens, heads, dim) or (..., heads, tokens, dim).

    The longer of the two. A wrong guess costs density or quality, never correctness: decoding uses the axis that was
    stored.
    """
    if hints.token_axis is not None:
        return hints.token_axis
    return -3 if len(shape) > 2 and shape[-3] >= shape[-2] else -2
