"""The coarser form below: made from the finer one's symbols, it is what the tensors themselves would have become."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.codecs import codec_for, encode_entry, encode_measured
from kvstore.codecs.basis import TIMES, Basis, made, read_basis, use
from kvstore.codecs.choice import CodecChoice
from kvstore.codecs.coarser import coarser, coarser_entry
from kvstore.codecs.hints import Hints
from kvstore.codecs.kv_learned import KVLearned, Learned, checked, encoded_in, read_coded
from kvstore.config import CodecPolicy, ColdConfig, HotConfig, Rate, StoreConfig, WarmConfig
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import CodecError, ConfigError
from kvstore.keys import Key
from kvstore.residency.transcode import raw_entry
from kvstore.store import Store
from tests.kvstore.codecs import tiny_model as tiny

MIB = 1 << 20
KEY = Key(b"k" * 32)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@cache
def pair(times: int = 3, bits: float = 3.2) -> tuple[Basis, Basis]:
    """A basis of the tiny model, and the coarser one that nests in it."""
    taught = tiny.learning()
    found = taught.for_bits(bits)
    return taught.basis(found, 1e-4), taught.basis(taught.coarser(found, times), 2e-3)


def named(path: Path, basis: Basis) -> str:
    path.write_bytes(basis.to_bytes())
    return str(path)


def parts_of(encoded: EncodedTensor) -> dict[str, bytes]:
    return {name: part.contiguous().view(torch.uint8).numpy().tobytes() for name, part in encoded.parts.items()}


def symbols(encoded: EncodedTensor) -> torch.Tensor:
    """All of them, escapes in their places: int32 (coefficients, tokens)."""
    basis, role, kept, _ = checked(encoded)
    transform = basis.planes[role]
    coded = read_coded(encoded, transform, kept)
    q = torch.from_numpy(coded.columns.astype("int32")) - 128
    q[q == -128] = torch.from_numpy(coded.escapes.astype("int32"))
    whole = torch.zeros(sum(transform.sizes), q.shape[1], dtype=torch.int32)
    whole[torch.from_numpy(coded.live)] = q
    return whole


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("times", TIMES)
def test_the_coarser_form_is_what_the_tensors_themselves_become(times: int, dtype: torch.dtype) -> None:
    """But for values within the rounding of float32 of the middle of two symbols, of which there are few."""
    fine, coarse = (use(basis) for basis in pair(times))
    for first in (0, 512):
        told = Hints(prefix_start=first == 0, position=first)
        for name, whole in (("k", tiny.keys(200, first, seed=9)), ("v", tiny.values(200, seed=9))):
            x = whole.clone()
            x[1, 40, 0] *= 30  # escapes
            below = coarser(encoded_in(fine, name, x.to(dtype), told), coarse)
            direct = encoded_in(coarse, name, x.to(dtype), told)
            assert below.attrs == direct.attrs
            assert parts_of(below).keys() == parts_of(direct).keys()
            differing = symbols(below) != symbols(direct)
            assert float(differing.float().mean()) < 1e-3
            assert int((symbols(below) - symbols(direct)).abs().max()) <= 1
            decoded = KVLearned().decode(below).float()
            due = KVLearned().decode(direct).float()
            assert float((decoded - x).norm()) <= 1.001 * float((due - x).norm())
            KVLearned().check(below)


def test_every_symbol_falls_into_the_cell_that_its_value_lies_in() -> None:
    """No value lies in a finer cell and outside the coarser one made from it: that would be rounding twice."""
    y = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    for times in TIMES:
        twice = (y.round() / times).round()
        assert bool(((y / times - twice).abs() <= 0.5 + 1e-12).all())


def test_bases_nest_that_differ_in_their_step_alone() -> None:
    fine, coarse = pair()
    assert coarse.times(fine) == 3
    assert fine.times(coarse) == 0
    assert fine.times(fine) == 0
    assert tiny.basis(2.5).times(fine) == 0, "another step, no odd number of times as wide"
    tensors = {**coarse.tensors, "v.mean": coarse.tensors["v.mean"] + 1e-6}
    assert made(coarse.about, tensors).times(fine) == 0
    assert made(replace(coarse.about, model="another"), coarse.tensors).times(fine) == 0
    with pytest.raises(CodecError, match="is no coarser form of"):
        coarser(encoded_in(use(fine), "k", tiny.keys(64)), use(tiny.basis(2.5)))


def test_an_entry_is_made_coarser_once_and_says_how_much_it_lost() -> None:
    fine, coarse = (use(basis) for basis in pair())
    x, v = tiny.keys(128), tiny.values(128)
    entry = encode_entry(raw_entry(KEY, {"k": x, "v": v, "ids": torch.arange(128)}), Learned(fine, codec_for("auto")))
    below = coarser_entry(entry, coarse)
    assert below.nbytes < 0.85 * entry.nbytes, "with what was kept, and the token ids"
    assert below.tensors["ids"] is entry.tensors["ids"]
    for name, whole in (("k", x), ("v", v)):
        direct = encode_measured(Learned(coarse, codec_for("auto")), name, whole)
        assert direct is not None
        assert below.receipt[name] >= 0.98 * direct.relative_error, "never less than what is lost"
        assert below.receipt[name] <= direct.relative_error + 2 * entry.receipt[name]
    assert coarser_entry(below, coarse) is below
    assert coarser_entry(below, fine) is below, "nothing becomes finer"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["finer", "coarser"])
@pytest.mark.parametrize("bits", [2.0, 3.2])
def test_a_decoded_copy_keeps_the_form_it_came_from(bits: float, which: int, dtype: torch.dtype) -> None:
    """At 2 bits most symbols are 0 in both, and values of the one lie near those of the other."""
    fine, coarse = (use(basis) for basis in pair(3, bits))
    codec = Learned(fine, codec_for("auto"), [coarse])
    for name, x in (("k", tiny.keys(128)), ("v", tiny.values(128))):
        held = encoded_in(fine, name, x.to(dtype))
        held = coarser(held, coarse) if which else held
        copy = raw_entry(KEY, {name: KVLearned().decode(held)}, receipt={name: 0.1})
        again = encode_entry(copy, codec).tensors[name]
        assert again.attrs["basis"] == (coarse if which else fine).digest
        assert float((symbols(again) != symbols(held)).float().mean()) < (1e-3 if dtype == torch.bfloat16 else 1e-6)


def test_any_damage_of_the_finer_form_is_an_error_and_no_other_tensor() -> None:
    fine, coarse = (use(basis) for basis in pair())
    held = encoded_in(fine, "k", tiny.keys(64))
    whole = held.parts[""]
    for at in range(0, whole.numel(), 7):
        damaged = whole.clone()
        damaged[at] ^= 0x55
        tensor = EncodedTensor(held.spec, held.encoding, {**held.parts, "": damaged}, held.attrs)
        try:
            made_of = coarser(tensor, coarse)
        except CodecError:
            continue
        KVLearned().decode(made_of)  # a stream of other symbols is a stream: records have checksums


def config(directory: Path, cold: ColdConfig | None = None, **warm: object) -> StoreConfig:
    fine, coarse = pair()
    bases = {"m": named(directory / "fine", fine), "m below": named(directory / "coarse", coarse)}
    below = cold or ColdConfig(namespaces={"m": Rate(bits=fine.about.bits - 0.5)})
    held = WarmConfig(16 * MIB, bases=bases, namespaces={"m": CodecPolicy("kv-learned", **warm)})  # type: ignore[arg-type]
    return StoreConfig(HotConfig(16 * MIB), held, replace(below, path=str(directory / "cold")), promote_after=0)


def put(store: Store) -> tuple[Key, ...]:
    space = store.namespace(
        model="m", revision="1", dtype="float32", layers=4, kv_heads=2, head_dim=8, layout="lthd",
        chunk_tokens=64,
    )  # fmt: skip
    space.put_prefix(list(range(64)), tiny.keys(64), tiny.values(64))
    return tuple(space.keys(list(range(64))))


def basis_in(store: Store, key: Key, tier: str) -> str:
    info = store.inspect(key)
    assert info is not None
    return dict(zip(info.tiers, (form.basis for form in info.forms), strict=True))[tier]


def test_what_sinks_into_cold_has_the_coarser_form_and_keeps_it_all_the_way_up(tmp_path: Path) -> None:
    fine, coarse = pair()
    with Store.open(config(tmp_path), clock=ManualClock(), background=False, framework="torch") as store:
        (key,) = put(store)
        store.demote(key)
        assert basis_in(store, key, "warm") == fine.digest
        store.demote(key)
        assert basis_in(store, key, "cold") == coarse.digest
        first = store.get(key)
        assert first is not None
        values = store.stats().values
        assert (values["coarsened"], values["encodes"]) == (1, 1)
        assert values["coarsened_nbytes"] > 0
        assert store.promote(key) == 1
        info = store.inspect(key)
        assert info is not None
        assert info.tiers[0] in ("hot", "warm")
        for _ in range(2):
            store.demote(key)
        again = store.get(key)
        assert again is not None
        assert basis_in(store, key, "cold") == coarse.digest
        assert all(torch.equal(again.tensors[name], x) for name, x in first.tensors.items())
        assert store.stats().values["encodes"] == 1, "never again"


def test_a_restart_and_a_drain_find_the_coarser_form(tmp_path: Path) -> None:
    _fine, coarse = pair()
    with Store.open(config(tmp_path), clock=ManualClock(), background=False) as store:
        (key,) = put(store)  # hot alone: closing drains it
    with Store.open(config(tmp_path), clock=ManualClock(), background=False, framework="torch") as store:
        assert basis_in(store, key, "cold") == coarse.digest
        hit = store.get(key)
        assert hit is not None
        assert float((hit.tensors["k"] - tiny.keys(64)).norm() / tiny.keys(64).norm()) < 0.4


def test_where_nothing_is_stated_cold_holds_what_warm_held(tmp_path: Path) -> None:
    fine, _coarse = pair()
    with Store.open(config(tmp_path, ColdConfig()), clock=ManualClock(), background=False) as store:
        (key,) = put(store)
        store.demote(key)
        store.demote(key)
        assert basis_in(store, key, "cold") == fine.digest
        assert store.stats().values["coarsened"] == 0


def test_an_entry_says_its_form_in_each_tier_its_bits_and_the_predicted_harm(tmp_path: Path) -> None:
    fine, coarse = pair()
    with Store.open(config(tmp_path), clock=ManualClock(), background=False) as store:
        (key,) = put(store)
        store.put(b"other", {"k": tiny.keys(64), "v": tiny.values(64)})
        found = []
        for _ in range(3):
            (told,) = store.explain(key)
            assert told.entry is not None
            found.append(told.entry.forms[0])
            store.demote(key)
        store.demote(b"other")
        info = store.inspect(b"other")
    assert [form.encoding for form in found] == ["raw", "kv-learned", "kv-learned"]
    assert [form.kl for form in found] == [0.0, fine.about.kl, coarse.about.kl]
    assert found[0].bits > 32 > found[1].bits > found[2].bits > 0
    assert info is not None
    assert (info.forms[0].encoding, info.forms[0].kl, info.forms[0].basis) == ("nf4-kv2", None, "")
    assert info.forms[0].bits > 4


@pytest.mark.parametrize(
    ("cold", "match"),
    [
        (ColdConfig(namespaces={"m": Rate(bits=0.9)}), r"namespaces\.m\.bits is 0\.9, and the coarsest .* --coarser"),
        (ColdConfig(namespaces={"m": Rate(max_kl=1e-9)}), r"cold\.namespaces\.m\.max_kl is 1e-09, and the finest"),
        (ColdConfig(namespaces={"x": Rate(bits=3)}), r"namespaces\.x states a rate, and the codec there is not"),
    ],
    ids=str,
)  # fmt: skip
def test_a_rate_below_that_cannot_be_kept_is_refused_at_the_start(cold: ColdConfig, match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        Store.open(config(tmp_path, cold), background=False)


def test_a_rate_below_chooses_among_the_forms_that_nest(tmp_path: Path) -> None:
    fine, three = pair()
    five = pair(5)[1]
    bases = {"m": fine, "three": three, "five": five, "apart": tiny.basis(2.5)}
    warm = WarmConfig(codec="kv-learned", bases={name: named(tmp_path / name, of) for name, of in bases.items()})
    for rate, due in (
        (Rate(bits=16), None),
        (Rate(bits=three.about.bits), three),
        (Rate(bits=three.about.bits - 0.01), five),
        (Rate(max_kl=1e-4), None),
        (Rate(max_kl=1), five),
    ):
        below = CodecChoice(warm, ColdConfig(namespaces={"m": rate})).coarser_of("m@00")
        assert (None if below is None else below.digest) == (None if due is None else due.digest)


def test_settings_of_a_rate_below_that_cannot_be_meant_are_refused() -> None:
    learned = WarmConfig(codec="kv-learned", bases={"*": "f"})
    for warm, cold, match in (
        (WarmConfig(), ColdConfig(bits=2), r"cold\.bits needs a codec 'kv-learned' in warm"),
        (learned, ColdConfig(bits=2, max_kl=0.1), r"cold\.bits and cold\.max_kl contradict"),
        (learned, ColdConfig(namespaces={"m": Rate(bits=17)}), r"cold\.namespaces\.m\.bits must be from 0 to 16"),
        (learned, ColdConfig(max_kl=-1), r"cold\.max_kl must be from 0 to 100"),
    ):
        with pytest.raises(ConfigError, match=match):
            StoreConfig(warm=warm, cold=cold)


def test_a_basis_that_is_read_again_nests_as_it_did(tmp_path: Path) -> None:
    fine, coarse = (read_basis(named(tmp_path / str(at), basis)) for at, basis in enumerate(pair()))
    assert coarse.times(fine) == 3
