"""A policy and a codec of one's own, put through the real store: what a researcher writes, and nothing else.

    python -m examples.extensions
    kvstored simulate TRACE --ram 64GiB --policy examples.extensions:LeastOften

The policy evicts what was used least often. The codec keeps each row in 8-bit floats with one scale: a quarter of
float32. A package offers the same by entry points, and then a settings file may name them:

    [project.entry-points."kvstored.policies"]
    least-often = "my_package:LeastOften"
    [project.entry-points."kvstored.codecs"]
    row-fp8 = "my_package:RowFp8"
"""

import tempfile
from collections.abc import Iterable, Iterator

import torch

from kvstore import StoreConfig, WarmConfig, register_codec, register_policy
from kvstore.codecs.hints import NO_HINTS, Hints
from kvstore.config import ColdConfig, HotConfig
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError
from kvstore.keys import Key
from kvstore.store import Store


class LeastOften:
    """Least often used first; of those used equally often, the one that came first. `victim` is O(n): an example."""

    def __init__(self) -> None:
        self._uses: dict[Key, int] = {}

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Keep a key; `soon`: as if it had been used less than any other."""
        self._uses[key] = self._uses.get(key, -1 if soon else 0) + 1

    def touch(self, keys: Iterable[Key]) -> list[Key]:
        """Count as use. Returns the keys it keeps."""
        known = [key for key in keys if key in self._uses]
        for key in known:
            self._uses[key] += 1
        return known

    def forget(self, key: Key) -> None:
        """Keep a key no longer."""
        self._uses.pop(key, None)

    def evict(self, key: Key) -> None:
        """Keep a key no longer, because its place was needed."""
        self._uses.pop(key, None)

    def victim(self) -> Key | None:
        """The key that should leave next."""
        return min(self._uses, key=self._uses.__getitem__, default=None)

    def __iter__(self) -> Iterator[Key]:
        return iter(sorted(self._uses, key=self._uses.__getitem__))

    def __contains__(self, key: object) -> bool:
        return key in self._uses

    def __len__(self) -> int:
        return len(self._uses)


class RowFp8:
    """Rows of 8-bit floats (e4m3), each with one float32 scale."""

    name = "row-fp8"
    lossy = True

    def encode(self, name: str, x: torch.Tensor, hints: Hints = NO_HINTS) -> EncodedTensor:
        """Encode a tensor of any shape with at least one axis. Raises CodecError where a value is not finite."""
        del hints
        if not x.dim() or not torch.isfinite(x).all():
            raise CodecError(f"{name!r}: only finite values in rows become {self.name}")
        rows = x.float().reshape(-1, x.shape[-1])
        scales = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max
        codes = (rows / scales).to(torch.float8_e4m3fn).view(torch.uint8)
        spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
        return EncodedTensor(spec, self.name, {"": codes.contiguous(), "scale": scales.reshape(-1)})

    def decode(self, encoded: EncodedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor again, in `out` where given."""
        self.check(encoded)
        rows = encoded.parts[""].view(torch.float8_e4m3fn).float() * encoded.parts["scale"].reshape(-1, 1)
        decoded = rows.reshape(encoded.spec.shape).to(getattr(torch, encoded.spec.dtype))
        return decoded if out is None else out.copy_(decoded)

    def check(self, encoded: EncodedTensor) -> None:
        """Raise CodecError where `decode` would: the parts come from a disk, and may be anybody's."""
        shape = encoded.spec.shape
        codes, scale = encoded.parts.get(""), encoded.parts.get("scale")
        if codes is None or scale is None or len(encoded.parts) != 2 or not shape:
            raise CodecError(f"{self.name} has two parts, got {sorted(encoded.parts)}")
        rows = torch.Size(shape[:-1]).numel()
        if codes.dtype != torch.uint8 or codes.shape != (rows, shape[-1]):
            raise CodecError(f"{self.name}: codes of {codes.dtype} {tuple(codes.shape)} for a tensor of shape {shape}")
        if scale.dtype != torch.float32 or scale.shape != (rows,):
            raise CodecError(f"{self.name}: scales of {scale.dtype} {tuple(scale.shape)} for {rows} rows")


def main() -> None:
    """Put, let it leave hot, restart, get: and say what the codec did to it."""
    register_policy("least-often", LeastOften)
    register_codec(RowFp8())
    k = torch.randn(4, 256, 2, 64, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as directory:
        config = StoreConfig(
            hot=HotConfig(8 << 20),
            warm=WarmConfig(8 << 20, codec="row-fp8"),
            cold=ColdConfig(path=directory),
            policy="least-often",
        )
        with Store.open(config) as store:
            store.put(b"prompt", {"k": k})
        with Store.open(config) as store:
            hit = store.get(b"prompt")
            info = store.inspect(b"prompt")
        assert hit is not None
        assert info is not None
        print(
            f"{hit.encoding} from {hit.tier}: {info.tier_nbytes[-1]:,} bytes on disk for {info.value_nbytes:,}, "
            f"relative error {hit.relative_error:.4f}"
        )


if __name__ == "__main__":
    main()
