"""Codecs of other people: registered by a program or offered by an installed package, and tried before they are used.

A codec's name stands in every record that it writes, so it is taken once and for good. A record whose codec is not
installed where it is read is a miss: `outside_codec` raises UnknownEncoding, which names it and what is known here.
"""

import inspect
import json

import torch

from kvstore.codecs import Stored
from kvstore.entries.entry import EncodedTensor, is_of
from kvstore.entries.torch_modes import without_torch_modes
from kvstore.errors import CodecError, ConfigError, UnknownEncoding
from kvstore.extensions import CODECS, OWN_CODECS

_CALLS = {"encode": ("name", "x", "hints"), "decode": ("encoded", "out"), "check": ("encoded",)}
"""The methods of a stored codec, and what they are called with."""


class OutsideCodec:
    """A codec of somebody else's, whose word is not taken: a caller gets a tensor of the spec, and what it asked for
    in `out`, which the codec need not know.
    """

    def __init__(self, codec: Stored) -> None:
        self.name, self.lossy = codec.name, codec.lossy
        self.encode, self.check = codec.encode, codec.check
        self._decode = codec.decode

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded tensor, in `out` where given. Raises CodecError, or whatever the codec does."""
        decoded = self._decode(encoded, out)
        if not is_of(decoded, encoded.spec):
            raise CodecError(f"decoded to {decoded.dtype} {tuple(decoded.shape)}, not {encoded.spec}")
        return decoded if out is None or decoded is out else out.copy_(decoded)


def register_codec(codec: Stored) -> None:
    """Make a codec known by its name, for `WarmConfig(codec=name)` and for the records that it writes.

    An installed package may offer it instead: an entry point of the group "kvstored.codecs", which is the codec or what
    makes it, under the codec's own name. Raises ConfigError for a name that is taken, and for what does not do what
    `codecs.Stored` says; two small tensors are encoded, checked and decoded to see.
    """
    _register(getattr(codec, "name", None), codec)


def outside_codec(name: str) -> Stored:
    """The codec that somebody registered or offers under a name.

    Raises UnknownEncoding, and CodecError for a name that no codec has in any version: that is damage.
    """
    if not CODECS.allows(name):
        raise CodecError(f"no codec is named {name!r:.80}")
    try:
        found = CODECS.find(name, _register)
    except ConfigError as error:
        raise UnknownEncoding(str(error)) from error
    if found is None:
        known = ", ".join([*(own for own in OWN_CODECS if own not in _WORDS), *CODECS.names()])
        raise UnknownEncoding(
            f"unknown encoding {name!r}; this version and the packages installed know {known}. "
            "If a codec from outside wrote it, install or register that"
        )
    return OutsideCodec(found)  # type: ignore[arg-type]  # `_register` has tried it


_WORDS = ("auto", "by-layer", "adaptive")


def _register(name: object, offered: object) -> None:
    if isinstance(offered, type) or not hasattr(offered, "encode"):
        if not callable(offered):
            raise ConfigError(f"codec {name!r}: expected a codec or what makes one, got {offered!r:.80}")
        try:
            offered = offered()
        except Exception as error:
            raise ConfigError(f"codec {name!r} cannot be made: {type(error).__name__}: {error}") from error
    own = getattr(offered, "name", None)
    if own != name or not isinstance(own, str):
        raise ConfigError(f"codec {name!r}: its attribute name is {own!r:.80}; a record names its codec by that")
    problem = _signature_problem(offered) or _trial_problem(offered)
    if problem:
        raise ConfigError(f"codec {name!r}: {problem}")
    CODECS.add(own, offered)


def _signature_problem(codec: object) -> str | None:
    if not isinstance(getattr(codec, "lossy", None), bool):
        return "its attribute lossy must be True or False"
    for method, arguments in _CALLS.items():
        call = getattr(codec, method, None)
        if not callable(call):
            return f"it has no method {method}({', '.join(arguments)})"
        try:
            inspect.signature(call).bind(*arguments)
        except TypeError as error:
            return f"{method} must take ({', '.join(arguments)}): {error}"
    return None


@without_torch_modes
def _trial_problem(codec: object) -> str | None:
    """What goes wrong with two small tensors; None: nothing. A codec may refuse a tensor by CodecError."""
    for shape in ((32, 64), (2, 16, 2, 8)):
        x = torch.linspace(-2, 2, 2048 if len(shape) == 2 else 512, dtype=torch.float32, device="cpu").reshape(shape)
        try:
            problem = _tried(codec, x)
        except CodecError:
            continue
        except Exception as error:  # noqa: BLE001 - somebody else's code
            return f"it fails on a float32 tensor of shape {shape}: {type(error).__name__}: {error}"
        if problem:
            return f"of a float32 tensor of shape {shape} {problem}"
    return None


def _tried(codec: object, x: torch.Tensor) -> str | None:
    before = x.clone()
    encoded = codec.encode("k", x)  # type: ignore[attr-defined]  # `_signature_problem` has looked
    if not torch.equal(x, before):
        return "encode changes its input"
    if not isinstance(encoded, EncodedTensor) or encoded.encoding != codec.name:  # type: ignore[attr-defined]
        return f"encode must return an EncodedTensor of its own encoding, got {encoded!r:.120}"
    if not is_of(x, encoded.spec) or not encoded.parts:
        return f"encode must keep the spec of its input and have a part, got {encoded.spec}"
    json.dumps(dict(encoded.attrs), allow_nan=False)
    codec.check(encoded)  # type: ignore[attr-defined]
    decoded = codec.decode(encoded)  # type: ignore[attr-defined]
    if not isinstance(decoded, torch.Tensor) or not is_of(decoded, encoded.spec):
        return "decode must return a tensor of that spec"
    if not codec.lossy and not torch.equal(decoded, x):  # type: ignore[attr-defined]
        return "decoding gives other numbers, and lossy is False"
    return None
