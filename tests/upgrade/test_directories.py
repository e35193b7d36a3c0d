"""Directories of older versions: served bit for bit, with all that was said of their entries; nothing comes back."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from kvstore.clock import ManualClock, SystemClock
from kvstore.config import ColdConfig, StoreConfig
from kvstore.store import Store
from kvstore.tiers.offline import compact, export, fsck, import_files

from .contents import ABSENT, BEGAN_AT, BLUE, SHORT_S, TENANT, TENANT_PREFIX, TTL_MAX_S, TTL_S, of_format


def open_store(older, clock=None, **cold):
    config = StoreConfig(
        cold=ColdConfig(path=str(older.cold), key_files={"nobody": str(older.seal_key)}, **cold),
        ttl_s=TTL_S, ttl_max_s=TTL_MAX_S,
    )  # fmt: skip
    return Store.open(
        config, clock=clock or SystemClock(), framework="numpy", background=False, tenants={TENANT: [TENANT_PREFIX]}
    )


def digest_of(hit):
    return {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in hit.tensors.items()}


def check_values(store, older, without=()):
    """Each entry: what the older version read back, exact ones what was put; and those that were gone are."""
    for name, written in of_format(older.format).items():
        hit = store.get(name.encode())
        if name in without:
            assert hit is None, name
            continue
        assert digest_of(hit) == older.digests[name], name
        assert hit.lossy is written.lossy
        for tensor, x in written.make().items():
            assert (hit.tensors[tensor].dtype, hit.tensors[tensor].shape) == (x.dtype, x.shape)
            if not written.lossy:
                assert hit.tensors[tensor].tobytes() == x.tobytes()
            else:
                wrong = np.linalg.norm(hit.tensors[tensor].astype(float) - x.astype(float)) / np.linalg.norm(x)
                assert 0 < wrong < 0.12
                assert wrong <= hit.receipt[tensor] * 1.01 or older.format == 1  # receipts are younger than format 1
    assert [store.get(name.encode()) for name in ABSENT] == [None] * len(ABSENT)
    if "blue" not in without:
        assert digest_of(store.get(TENANT_PREFIX + b"kinds")) == {"x": hashlib.sha256(BLUE.make()["x"]).hexdigest()}
    values = store.stats().values
    assert values["misses_corrupt"] == values["cold_corrupt_total"] == 0


def test_it_is_served_bit_for_bit(older):
    with open_store(older) as store:
        check_values(store, older)
        assert list(store.verify())[-1].corrupt == 0
    with open_store(older) as store:  # and once more, as what this version made of it
        check_values(store, older)


@pytest.mark.parametrize("state", ["not clean", "missing"])
def test_it_is_served_after_the_older_daemon_was_killed(older, state):
    if state == "missing":
        (older.cold / "STATE").unlink()
    else:
        said = json.loads((older.cold / "STATE").read_text())
        (older.cold / "STATE").write_text(json.dumps({**said, "clean": False}))
    with open_store(older) as store:
        check_values(store, older)


def test_what_was_said_of_its_entries_still_holds(older):
    clock = ManualClock(BEGAN_AT + 2.0)  # right after it was closed: a pin of two minutes still holds
    with open_store(older, clock) as store:
        pinned, plain, fixed = (store.inspect(name) for name in (b"pinned", b"kinds", b"does not slide"))
        assert (pinned.pinned, pinned.ttl_left_s, plain.pinned) == (True, None, False)
        assert plain.ttl_left_s == pytest.approx(TTL_S, abs=10)
        assert (plain.fidelity, store.inspect(b"replaced").fidelity) == ("exact", "auto")
        assert store.inspect(b"pin lapsed").pinned
        assert store.get(b"expired") is not None  # it had a minute
        encodings = {name: store.inspect(name.encode()).encoding for name in ("kinds", "nf4", "nf4-kv", "int8")}
        assert encodings == {"kinds": "raw", "nf4": "nf4", "nf4-kv": "nf4-kv", "int8": "int8"}
        assert store.inspect(TENANT_PREFIX + b"kinds").tenant == TENANT
        assert store.tenants()["cold"][TENANT] > 0
        if older.format > 1:
            assert store.inspect(b"named").namespace == "model@1"
            assert store.inspect(b"layers").encoding == "layers"
        clock.advance(3 * SHORT_S)
        assert store.get(b"expired") is None
        assert not store.inspect(b"pin lapsed").pinned  # its minute starts anew
        assert store.get(b"pinned") is not None
        before = fixed.ttl_left_s
        store.touch([b"does not slide", b"kinds"])
        assert store.inspect(b"does not slide").ttl_left_s == pytest.approx(before - 3 * SHORT_S, abs=1)
        assert store.inspect(b"kinds").ttl_left_s == pytest.approx(TTL_S, abs=1)
        clock.advance(2 * SHORT_S)
        assert store.get(b"pin lapsed") is None


def test_a_chunk_of_it_still_does_not_outlive_the_one_it_continues(older):
    with open_store(older) as store:
        assert store.delete(b"child") == 1
        assert [store.get(name) is None for name in (b"root", b"child", b"grandchild", b"other child")] == [
            False, True, True, False,
        ]  # fmt: skip
    with open_store(older) as store:
        assert store.get(b"grandchild") is None
        assert store.delete(b"root") == 1
        assert store.get(b"other child") is None


def test_new_small_records_beside_old_ones_and_deleted_old_ones_harm_no_neighbour(older):
    """Format 1 gives each record blocks of its own, format 2 shares them: one directory then holds both."""
    rng = np.random.RandomState(0)
    new = {b"new %d" % i: rng.randint(0, 256, 700).astype(np.uint8) for i in range(60)}
    with open_store(older) as store:
        for key, x in new.items():
            store.put(key, {"x": x}, fidelity="exact")
        assert store.delete(b"replaced", b"kinds", b"new 0") == 3
        store.drain()
    with open_store(older) as store:
        check_values(store, older, without=("replaced", "kinds"))
        assert store.get(b"new 0") is None
        for key, x in list(new.items())[1:]:
            assert store.get(key).tensors["x"].tobytes() == x.tobytes()


def test_the_offline_verbs_know_it(older, tmp_path):
    # fsck reads what is sealed only with its key, which it is not given: that record stays.
    sealed = int(older.format > 1)
    checked = fsck(older.cold, SystemClock())
    assert (checked.corrupt, checked.unreadable, checked.quarantined) == (0, sealed, None)
    assert checked.entries == len(of_format(older.format)) + 2  # a tenant's, and the one whose pin lapsed
    compact(older.cold, SystemClock())
    with open_store(older) as store:
        check_values(store, older)
    exported, again = tmp_path / "exported", replace(older, cold=tmp_path / "again")
    exported.mkdir(mode=0o700)
    assert export(older.cold, exported, SystemClock()).entries == checked.entries - sealed
    import_files(again.cold, sorted(exported.iterdir()), SystemClock(), ttl_s=TTL_S)
    with open_store(again) as store:
        check_values(store, older, without=("sealed",) * sealed)


def test_a_directory_of_a_later_format_is_refused_in_words_and_left_as_it_is(older):
    (older.cold / "STATE").write_text('{"format": 3, "clean": true, "boot_id": ""}')
    before = {path: path.read_bytes() for path in older.cold.rglob("*") if path.is_file()}
    with pytest.raises(Exception, match=r"has format 3, this version knows 1 to 2: use the version that wrote it"):
        open_store(older)
    assert {path: path.read_bytes() for path in older.cold.rglob("*") if path.is_file()} == before
