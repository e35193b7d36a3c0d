"""Owners past the limit, and which of them may be forgotten; tombstones past theirs."""

import pytest

from kvstore.keys import Key
from kvstore.metadata import tenants as module
from kvstore.metadata.owner import Owner
from kvstore.metadata.tenants import Tenants
from kvstore.metadata.tombstones import Tombstone, Tombstones


def test_an_owner_is_idle_that_holds_no_entry_and_no_byte_of_any_tier() -> None:
    assert Owner().idle
    assert not Owner(entries=1).idle
    for tier in range(3):
        nbytes = [0, 0, 0]
        nbytes[tier] = 5
        assert not Owner(nbytes=nbytes).idle


def test_past_the_limit_idle_owners_go_and_the_others_keep_their_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OWNERS_MAX", 3)
    tenants = Tenants({}, {})
    kept = [tenants.owner(Key(b"k"), name) for name in ("a", "b", "c")]
    for owner in kept:
        owner.entries = 1
    nobody = tenants.owner(Key(b"k"), "d")
    assert nobody.namespace == ""
    nobody.entries = 1
    assert tenants.owner(Key(b"k"), "e") is nobody is tenants.owner(Key(b"k"), "")
    assert [tenants.owner(Key(b"k"), name) for name in ("a", "b", "c")] == kept
    kept[1].entries = kept[2].entries = 0
    assert tenants.owner(Key(b"k"), "f").namespace == "f", "in the place of one that was idle"
    assert tenants.owner(Key(b"k"), "a") is kept[0]


def test_the_oldest_tombstone_goes_first_and_one_set_again_is_the_newest() -> None:
    stones = Tombstones(2)
    for at, name in enumerate((b"a", b"b", b"a", b"c")):
        stones.add(Key(name), Tombstone("deleted", "hot", float(at), 0))
    assert stones.get(Key(b"b")) is None
    assert [stone.at if (stone := stones.get(Key(name))) else None for name in (b"a", b"c")] == [2.0, 3.0]
    assert len(stones) == 2
    stones.pop(Key(b"a"))
    assert stones.get(Key(b"a")) is None
