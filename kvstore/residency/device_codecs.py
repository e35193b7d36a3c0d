"""Forms and answers of entries whose hot tier is on a device: what `transcode` and `answers` are for the host's.

On the device where the codecs have kernels there, else on the host, with the same bytes: whatever goes wrong on the
device (no compiler, no memory, a kernel that fails) is tried again on the host, whose verdict counts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvstore import arrays
from kvstore.boundary import Blaming
from kvstore.codecs.choice import CodecChoice
from kvstore.config import StoreConfig
from kvstore.entries.compact import PackedTensors
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.errors import InvalidEntry
from kvstore.hit import Hit
from kvstore.keys import Key
from kvstore.metadata.tombstones import GoneCause
from kvstore.residency.answers import Answers, as_torch, to_numpy
from kvstore.residency.device_hot import DeviceHot, raw_nbytes
from kvstore.residency.read_path import Found
from kvstore.residency.state import Residency
from kvstore.residency.transcode import TensorTranscoder
from kvstore.shm.arena import Room, empty_tensors, made_in
from kvstore.tiers.device_memory import DeviceTensors, tensors_on_device


class DeviceTranscoder(TensorTranscoder):
    """Forms of entries for and from a device. See `residency.transcode.Transcoder`."""

    def __init__(self, policies: CodecChoice, residency: Residency, hot: DeviceHot) -> None:
        super().__init__(policies, torch.device("cpu"), residency)
        self._hot = hot
        self._there = TensorTranscoder(policies, hot.where, residency)

    def encode(self, entry: Entry, *, prefix_start: bool | None = None, namespace: str = "") -> Entry:
        """Encoded where the codec may, in RAM."""
        hot = self._hot
        if tensors_on_device(entry) is not None and hot.computes(entry.value_nbytes):
            try:
                below = self._off_the_block(
                    self._there.encode(hot.viewed(entry), prefix_start=prefix_start, namespace=namespace)
                )
                return self._beside(below, entry)
            except Exception as error:  # noqa: BLE001 - Triton raises whatever its compiler does
                hot.failed("encode", error)
            finally:
                hot.settle()  # a kernel that was started may still read the block
        return super().encode(hot.localized(entry), prefix_start=prefix_start, namespace=namespace)

    def exact(self, entry: Entry) -> Entry:
        """The same tensors in RAM."""
        return self._hot.localized(entry)

    def restore(self, entry: Entry) -> Entry:
        """Decoded on the device, in a block of hot's. Raises OverQuota where there is no room."""
        hot = self._hot
        block = hot.room(entry.specs, entry.key, raw_nbytes(entry), self._r.owner_of(entry.key))
        if entry.encoding != "raw" and hot.computes(entry.value_nbytes):
            made = hot.entry_in(block, entry)
            held = tensors_on_device(made)
            assert held is not None
            try:
                self._there.decode(entry, hot.views(held))
            except Exception as error:  # noqa: BLE001 - also CodecError: the host says whether the entry is damaged
                hot.failed("decode", error)
            else:
                return made
            finally:
                hot.settle()
        return hot.filled(block, entry, super().decode(entry))

    def decode(self, entry: Entry, out: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of an entry on the host: fresh ones on the device, or into `out`, dense ones on the host."""
        hot = self._hot
        if out is not None:
            return super().decode(entry, out)
        if entry.encoding != "raw" and hot.computes(entry.value_nbytes):
            try:
                return self._there.decode(entry)
            except Exception as error:  # noqa: BLE001 - as above
                hot.failed("decode", error)
        return {name: x.to(hot.where) for name, x in super().decode(entry).items()}

    def _off_the_block(self, below: Entry) -> Entry:
        """What was encoded, with nothing left in it that lies in the block."""
        if isinstance(below.tensors, PackedTensors) or "raw" not in below.encodings:
            return below
        tensors = {
            name: t if t.encoding != "raw" else EncodedTensor(t.spec, "raw", {"": t.parts[""].clone()}, t.attrs)
            for name, t in below.tensors.items()
        }
        return Entry(below.key, tensors, lossy=below.lossy)


class DeviceAnswers(Answers):
    """Hits of entries on a device: on the host for a door, which gives room for them, else on the device."""

    def __init__(
        self,
        residency: Residency,
        transcoder: DeviceTranscoder,
        framework: str,
        forget: Callable[[Sequence[Key], GoneCause], int],
        hot: DeviceHot,
    ) -> None:
        super().__init__(residency, transcoder, framework, hot.where, forget)
        self._hot = hot

    @contextmanager
    def lent(self) -> Iterator[None]:
        """What this thread's stream is to do with the views is done before they end."""
        try:
            yield
        finally:
            self._hot.settle()

    def _hit_or_raise(self, found: Found, *, out: Mapping[str, Any] | None, copy: bool, room: Room | None) -> Hit:
        key, tier, entry, age_s = found
        held = tensors_on_device(entry)
        tensors: Mapping[str, Any]
        if room is not None and held is not None:
            tensors = self._hot.host(held, room(held.specs))
        elif room is not None and entry.encoding != "raw":
            tensors = self._transcoder.decode(entry, made_in(room, entry.specs))
        elif out is not None:
            tensors = self._into(entry, held, out)
        elif held is not None:
            tensors = self._held(held, copy=copy)
        else:
            return super()._hit_or_raise(found, out=out, copy=copy, room=room)
        return Hit(key, tensors, tier, entry.encoding, entry.lossy, age_s, entry.receipt)

    def _held(self, held: DeviceTensors, *, copy: bool) -> Mapping[str, Any]:
        hot = self._hot
        if not copy:
            return hot.views(held)
        if arrays.resolve_framework(self._framework) == "numpy":
            return {name: to_numpy(x) for name, x in hot.host(held).items()}
        fresh = empty_tensors(held.specs, hot.where)
        hot.copy_to(held.addresses, fresh)
        return fresh

    def _into(self, entry: Entry, held: DeviceTensors | None, out: Mapping[str, Any]) -> dict[str, Any]:
        """Fill a caller's tensors, as `get(out=)`: each in one copy that waits for what the caller's stream does."""
        given, specs = {name: arrays.describe(name, x) for name, x in out.items()}, dict(entry.specs)
        if given != specs:
            raise InvalidEntry(f"out must hold exactly the entry's tensors {specs}, got {given}")
        decoded = {} if held is not None else self._transcoder.decode(entry)
        addresses = {name: x.data_ptr() for name, x in decoded.items()} if held is None else held.addresses
        targets = {name: x if arrays.is_torch(x) else as_torch(x) for name, x in out.items()}
        direct = {name: x for name, x in targets.items() if self._hot.fills(x)}
        aside = empty_tensors({name: specs[name] for name in targets if name not in direct})
        self._hot.copy_to(addresses, {**direct, **aside})
        with Blaming(InvalidEntry, "out"):
            for name, x in aside.items():
                targets[name].copy_(x)
        return dict(out)


def forms_of(
    config: StoreConfig,
    residency: Residency,
    hot: DeviceHot | None,
    *,
    framework: str,
    room: Room | None,
    forget: Callable[[Sequence[Key], GoneCause], int],
) -> tuple[TensorTranscoder, Answers]:
    """The forms and answers of a store. hot: None where that is in RAM; then room: where promoted tensors are made."""
    policies = CodecChoice(config.warm, config.cold)
    if hot is not None:
        there = DeviceTranscoder(policies, residency, hot)
        return there, DeviceAnswers(residency, there, framework, forget, hot)
    ram = torch.device("cpu")
    here = TensorTranscoder(policies, ram, residency, room)
    return here, Answers(residency, here, framework, ram, forget)
