"""What a door has checked has a type that says so, and nobody behind it checks again."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import kvstore.arrays
import kvstore.keys
from kvstore import Store, TensorInfo
from kvstore.arrays import CheckedSpecs, describe
from kvstore.config import StoreConfig
from kvstore.dtypes import TensorSpec
from kvstore.errors import EntryTooLarge, InvalidEntry
from kvstore.keys import CheckedKeys, check_key, check_keys
from kvstore.options import PutOptions
from kvstore.residency.transcode import made_entry
from kvstore.shm.arena import Arena

X = {"k": torch.arange(6.0).reshape(2, 3)}


def made(key, tensors=X):
    specs = CheckedSpecs({name: describe(name, x) for name, x in tensors.items()})
    return made_entry(check_key(key), specs, tensors)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ttl_s": 0}, {"ttl_s": -1}, {"ttl_s": float("nan")}, {"ttl_s": float("inf")}, {"fidelity": "best"},
        {"priority": "high"}, {"namespace": "x" * 97}, {"namespace": "\n"}, {"namespace": 3},
    ],
)  # fmt: skip
def test_options_that_no_store_accepts_cannot_be_made(wrong):
    with pytest.raises(InvalidEntry, match=next(iter(wrong))):
        PutOptions(**wrong)


def test_equal_options_are_equal():
    assert PutOptions(ttl_s=3, pin=True) == PutOptions(ttl_s=3, pin=True) != PutOptions()


@pytest.mark.parametrize("bad", [[b""], [b"x" * 257], ["text"], [b"ok", 3], b"one", "text", 3, [b"x"] * 4097])
def test_keys_that_were_not_checked_are_no_checked_keys(bad):
    with pytest.raises(InvalidEntry):
        CheckedKeys(bad)


def test_checked_keys_are_taken_as_they_are_by_every_verb(monkeypatch):
    with Store.open() as store:
        store.put_many([(b"a", X), (b"b", X)])
        keys = CheckedKeys([b"a", bytearray(b"b")])
        monkeypatch.setattr(kvstore.keys, "check_key", None)
        monkeypatch.setattr(kvstore.keys, "_LENGTHS", None)
        assert CheckedKeys(keys) is check_keys(keys) is keys
        assert keys.part(1) == (b"b",)
        assert CheckedKeys(keys.part(1)) == (b"b",)
        assert len(store.get_many(keys)) == store.touch(keys) == store.match(keys) == 2
        assert len(store.plan(keys)) == len(store.locate(keys)) == 2
        assert (store.pin(keys), store.unpin(keys), len(store.explain(keys)), store.delete(keys)) == (2, 2, 2, 2)


def test_what_is_cut_out_of_checked_keys_otherwise_is_not_taken_for_checked():
    assert type(CheckedKeys([b"a", b"b"])[:1]) is tuple


def test_a_tensors_type_and_shape_are_one_class_everywhere():
    assert TensorInfo is TensorSpec
    assert TensorSpec("bfloat16", (2, 3)).nbytes == 12


def test_checked_specs_know_their_bytes_and_their_limit():
    specs = {"k": TensorSpec("float32", (10,)), "v": TensorSpec("int8", (5,))}
    assert CheckedSpecs(specs).nbytes == 45
    with pytest.raises(EntryTooLarge, match="at most 44 bytes, got 45"):
        CheckedSpecs(specs, 44)
    with pytest.raises(InvalidEntry, match="unknown dtype"):
        CheckedSpecs({"k": TensorSpec("float31", (1,))})


def test_an_entry_that_a_door_made_is_held_itself_and_not_described_again(monkeypatch):
    with Store.open() as store:
        entries = [made(b"a"), made(b"b")]
        monkeypatch.setattr(kvstore.arrays, "describe", None)
        monkeypatch.setattr(kvstore.arrays, "check_specs", None)
        assert store.put_entries(entries, PutOptions(fidelity="exact"), chain=True) == 2
        assert store.plan([b"a", b"b"]).entries == entries
        monkeypatch.undo()
        assert torch.equal(store.get(b"b").tensors["k"], X["k"])
        store.delete(b"a")
        assert store.match([b"b"]) == 0, "they were a chain"


def test_of_two_made_entries_under_one_key_the_later_is_kept_and_both_count():
    with Store.open() as store:
        first, second = made(b"a"), made(b"a")
        assert store.put_entries([first, second], PutOptions()) == 2
        assert store.plan([b"a"]).entries == [second]
        assert store.put_entries([made(b"c")], PutOptions(), chain=True, parent=check_key(b"absent")) == 0


def test_what_only_a_store_knows_is_refused_of_made_entries_too():
    with Store.open(StoreConfig(ttl_max_s=10, ttl_s=5)) as store:
        with pytest.raises(InvalidEntry, match="at most 10 seconds"):
            store.put_entries([made(b"a")], PutOptions(ttl_s=11))
        assert store.locate([b"a"]) == [None]


def test_bad_options_are_refused_before_a_byte_is_copied(monkeypatch):
    with Store.open(StoreConfig(ttl_max_s=10, ttl_s=5)) as store:
        monkeypatch.setattr(kvstore.arrays, "check_storage", None)
        with pytest.raises(InvalidEntry, match="at most 10 seconds"):
            store.put(b"a", X, ttl_s=11)


class Lying(torch.Tensor):
    """Says it has another shape than it has."""

    @property
    def shape(self):
        return torch.Size([3, 2])


def test_a_tensor_that_lies_about_its_shape_is_refused():
    with Store.open() as store, pytest.raises(InvalidEntry, match="says it is"):
        store.put(b"a", {"k": X["k"].as_subclass(Lying)})


def test_the_arena_says_where_the_block_is_and_what_is_decoded_into_it_says_so_too():
    arena = Arena(4 << 20, segment_nbytes=2 << 20)
    try:
        with Store.open(room=arena.empty, background=False) as store:
            specs = CheckedSpecs({"k": TensorSpec("float32", (64, 64))})
            tensors = arena.empty(specs)
            tensors["k"].copy_(torch.randn(64, 64))
            store.put_entries([made_entry(check_key(b"a"), specs, tensors)], PutOptions())
            (hit,) = store.read(store.plan([b"a"]))
            assert hit.tensors.place == tensors.place == store.plan([b"a"]).entries[0].block
            assert same_place(arena, tensors)
            store.demote(b"a")
            (warm,) = store.read(store.plan([b"a"]), room=arena.empty)
            assert warm.tier == "warm"
            assert same_place(arena, warm.tensors)
            store.promote(b"a")
            (entry,) = store.plan([b"a"]).entries
            assert entry.block is not None
            assert entry.block.segment.address + entry.block.start + 64 == entry.tensors["k"].parts[""].data_ptr()
    finally:
        arena.close()


def same_place(arena, tensors):
    """What it says is what is found by address."""
    from kvstore.shm.layout import layout

    specs = {name: describe(name, x) for name, x in tensors.items()}
    return arena.place_in(tensors, *layout(specs), os.geteuid()) == tensors.place


def test_a_block_that_no_tensor_holds_is_no_place():
    arena = Arena(4 << 20, segment_nbytes=2 << 20)
    try:
        assert arena.empty({"k": TensorSpec("int8", (0,))}).place is None
    finally:
        arena.close()


def test_what_a_door_needs_to_name_a_store_loads_no_torch():
    code = "import kvstore.view, kvstore.options, kvstore.pieces, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_numpy_arrays_are_stored_as_their_spec_says():
    with Store.open(framework="numpy") as store:
        x = np.arange(6, dtype=">f4").reshape(2, 3)
        store.put(b"a", {"k": x})
        assert (store.get(b"a").tensors["k"] == x).all()
