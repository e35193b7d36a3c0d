"""Keys of chunks stand for what they hold: equal ones are found by every later version, and nothing else is."""

import hashlib

import pytest

import kvstore.keys
from kvstore.errors import InvalidEntry
from kvstore.keys import Identity, check_keys, check_namespace, chunk_keys, tail_keys, token_bytes

IDENTITY = {
    "model": "m",
    "revision": "r",
    "dtype": "bfloat16",
    "layers": 2,
    "kv_heads": 3,
    "head_dim": 64,
    "layout": "lthd",
}


def test_keys_are_those_of_every_version_before() -> None:
    """Written down once: another version of the identity, or of the arithmetic, would find nothing that is stored."""
    root = Identity(**IDENTITY).digest()
    assert root.hex() == "244f5fd6810215c243e58131ba08f63e11111397d47fc820176ebf5baa0a58f1"
    assert Identity(**IDENTITY).digest(b"salt") != root
    keys = chunk_keys(root, [1, 2, 3, 4, 5], chunk_tokens=2)
    assert [key.hex()[:16] for key in keys] == ["bf8e6e430c0bdf45", "d56ee5970410d0d9", "e2e519213c64733b"]
    assert keys[0] == hashlib.sha256(root + b"\1\0\0\0\2\0\0\0").digest()
    assert keys[1] == hashlib.sha256(keys[0] + b"\3\0\0\0\4\0\0\0").digest()
    assert keys[2] == hashlib.sha256(keys[1] + b"\5\0\0\0").digest()
    assert tail_keys(keys[1], [5, 6]) == [
        hashlib.sha256(keys[1] + b"\5\0\0\0\6\0\0\0").digest(),
        keys[2],
    ]


@pytest.mark.parametrize("value", [True, False, -1, 2, 1.0, "0", None])
@pytest.mark.parametrize("name", ["tp", "pp"])
def test_a_rank_is_an_integer_below_the_size(name: str, value: object) -> None:
    """True is 1 to Python and "true" in the JSON of the identity: two keys for one shard."""
    with pytest.raises(InvalidEntry, match=f"{name}_rank must be in 0..1"):
        Identity(**{**IDENTITY, f"{name}_size": 2, f"{name}_rank": value})
    for rank in (0, 1):
        Identity(**{**IDENTITY, f"{name}_size": 2, f"{name}_rank": rank})


@pytest.mark.parametrize("name", ["layers", "kv_heads", "head_dim", "tp_size", "pp_size"])
@pytest.mark.parametrize("value", [True, 0, -1, 1.0, "1", None])
def test_a_size_is_an_integer_of_at_least_one(name: str, value: object) -> None:
    with pytest.raises(InvalidEntry, match=f"{name} must be an integer of at least 1"):
        Identity(**{**IDENTITY, name: value})


@pytest.mark.parametrize("name", ["model", "revision", "dtype", "layout"])
@pytest.mark.parametrize("value", ["", None, 1])
def test_what_names_the_tensors_is_never_empty(name: str, value: object) -> None:
    with pytest.raises(InvalidEntry, match=f"{name} must be a non-empty string"):
        Identity(**{**IDENTITY, name: value})


def test_every_field_of_an_identity_is_in_its_digest() -> None:
    others = {
        "model": "n", "revision": "s", "dtype": "float16", "layers": 3, "kv_heads": 4, "head_dim": 128,
        "layout": "ltdh", "rope": {"theta": 1.0}, "tp_rank": 1, "tp_size": 5, "pp_rank": 1, "pp_size": 5,
        "fidelity": "exact",
    }  # fmt: skip
    sizes = {"tp_size": 4, "pp_size": 4}
    plain = Identity(**IDENTITY, **sizes).digest()
    found = {name: Identity(**{**IDENTITY, **sizes, name: value}).digest() for name, value in others.items()}
    assert set(found) == set(Identity.__dataclass_fields__)
    assert len({plain, *found.values()}) == len(others) + 1


def test_tokens_are_little_endian_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert token_bytes([1, 2**32 - 1]) == b"\1\0\0\0\xff\xff\xff\xff"
    monkeypatch.setattr(kvstore.keys.sys, "byteorder", "big")  # type: ignore[attr-defined]
    assert token_bytes([1]) == b"\0\0\0\1", "what this machine calls little is swapped"


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], [[1]], ["1"], None, 5])
def test_what_is_no_token_has_no_key(ids: object) -> None:
    with pytest.raises(InvalidEntry, match="token ids"):
        token_bytes(ids)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "fits"), [(0, False), (1, True), (512, True), (513, False)])
def test_a_chunk_has_one_to_512_tokens(tokens: int, fits: bool) -> None:
    if fits:
        assert len(chunk_keys(b"", [1, 2], chunk_tokens=tokens)) == (2 if tokens == 1 else 1)
    else:
        with pytest.raises(InvalidEntry, match="512"):
            chunk_keys(b"", [1, 2], chunk_tokens=tokens)


def test_limits_on_keys_and_names() -> None:
    assert check_keys([b"k"] * 4096) == (b"k",) * 4096
    with pytest.raises(InvalidEntry, match="4096"):
        check_keys([b"k"] * 4097)
    assert check_keys([b"x" * 256, bytearray(b"y")]) == (b"x" * 256, b"y")
    for wrong in (b"", b"x" * 257):
        with pytest.raises(InvalidEntry):
            check_keys([b"k", wrong])
    assert check_namespace("x" * 96) == "x" * 96
    for name in ("x" * 97, "é" * 49, "a\nb", b"bytes", None):
        with pytest.raises(InvalidEntry, match="96 bytes"):
            check_namespace(name)  # type: ignore[arg-type]
