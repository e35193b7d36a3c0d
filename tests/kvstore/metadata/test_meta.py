"""What a Meta says of itself: when it expires, when it was used, whether a prompt begins with it."""

from dataclasses import replace
from math import inf

import pytest

from kvstore.keys import Key
from kvstore.metadata.meta import Meta

META = Meta(created_at=100.0, expires_at=110.0, ttl_s=10.0, value_nbytes=1)


def test_an_entry_has_expired_at_its_deadline_and_a_pinned_one_never_does() -> None:
    assert not META.expired(109.99)
    assert META.expired(110.0)
    assert not replace(META, pinned=True).expired(1e9)
    assert META.deadline == 110.0
    assert replace(META, pinned=True).deadline == inf
    assert replace(META, pinned=True, pinned_until=105.0).deadline == 105.0


def test_an_entry_was_used_when_it_was_hit_and_before_that_when_it_was_put() -> None:
    assert META.used_at == 100.0
    assert replace(META, last_hit_at=104.0).used_at == 104.0


@pytest.mark.parametrize(("sliding", "expires_at"), [(True, 115.0), (False, 110.0)])
def test_only_a_sliding_deadline_moves(sliding: bool, expires_at: float) -> None:
    meta = replace(META, sliding=sliding)
    meta.refresh(105.0)
    assert meta.expires_at == expires_at
    meta.refresh(105.0, ttl_s=50.0)
    assert meta.ttl_s == (50.0 if sliding else 10.0), "no deadline is later than that from now"
    assert meta.expires_at == (155.0 if sliding else 110.0)


def test_a_prompt_begins_with_a_root_not_with_what_continues_one_and_perhaps_with_what_is_no_chunk() -> None:
    assert META.prefix_start is None
    assert replace(META, root=True).prefix_start is True
    assert replace(META, parent=Key(b"p")).prefix_start is False
    assert replace(META, parent=Key(b"p"), root=True).prefix_start is False
