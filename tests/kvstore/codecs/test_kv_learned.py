"""kv-learned: what it saves, what comes back, which basis it needs, and what it refuses."""

import gc
import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.clock import ManualClock
from kvstore.codecs import codec_for, codec_named, decode_entry, encode_entry, encode_measured, rans
from kvstore.codecs import kv_learned as module
from kvstore.codecs.basis import Basis, from_bytes, made, read_basis, use, with_digest
from kvstore.codecs.choice import CodecChoice
from kvstore.codecs.hints import Hints
from kvstore.codecs.kv_learned import KVLearned, Learned, encoded_in
from kvstore.codecs.nf4_kv2 import NF4KV2
from kvstore.codecs.rotation import Rotation, measured
from kvstore.config import CodecPolicy, ColdConfig, HotConfig, LayerCodec, StoreConfig, WarmConfig
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.errors import CodecError, ConfigError, UnknownEncoding
from kvstore.kernels import Products, cpu
from kvstore.keys import Key
from kvstore.residency.transcode import raw_entry
from kvstore.store import Store
from tests.kvstore.codecs import tiny_model as tiny

TRITON: list[tuple[None, None, Products]] = []
if os.environ.get("TRITON_INTERPRET") == "1":  # as tests/kvstore/kernels/test_triton.py runs this file
    from kvstore.kernels.cuda_learned import learned_products

    TRITON.append((None, None, learned_products))

GOLDEN = Path(__file__).parents[2] / "golden"
MIB = 1 << 20
KEY = Key(b"k" * 32)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def basis() -> Basis:
    return use(tiny.basis())


def learned(basis: Basis) -> Learned:
    return Learned(basis, codec_for("auto"))


def bits_a_value(encoded: EncodedTensor) -> float:
    held = sum(part.numel() * part.element_size() for part in encoded.parts.values())
    return held * 8 / torch.Size(encoded.spec.shape).numel()


def raw_bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def parts_of(encoded: EncodedTensor) -> dict[str, bytes]:
    return {name: raw_bits(part) for name, part in encoded.parts.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_take_half_the_bits_of_nf4_and_lose_less(basis: Basis, dtype: torch.dtype) -> None:
    for name, whole in (("k", tiny.keys(256, 512, seed=9)), ("v", tiny.values(256, seed=9))):
        x = whole.to(dtype)
        found = encode_measured(learned(basis), name, x, Hints(prefix_start=False))
        plain = encode_measured(NF4KV2(), name, x, Hints(prefix_start=False))
        assert found is not None
        assert plain is not None
        assert found.encoding == "kv-learned"
        assert bits_a_value(found) < 0.75 * bits_a_value(plain)
        decoded = codec_named("kv-learned").decode(found)
        assert (decoded.dtype, decoded.shape) == (x.dtype, x.shape)
        assert 0 < found.relative_error < 0.5


def test_the_receipt_does_not_count_what_is_kept_as_content(basis: Basis) -> None:
    """A prompt's first token is large and kept in 16 bits: counted, it hid the error of the others."""
    found = []
    for size in (1.0, 30.0):
        x = tiny.values(128)
        x[:, :1] *= size
        encoded = encode_measured(learned(basis), "v", x, Hints(prefix_start=True, position=0))
        assert encoded is not None
        assert (encoded.encoding, encoded.attrs["kept"]) == ("kv-learned", 1)
        found.append(encoded.relative_error)
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0, 300])
def test_every_instruction_set_and_torch_read_the_same_bits(
    basis: Basis, dtype: torch.dtype, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escapes, kept tokens and a number of tokens that no tile divides among them."""
    best = cpu.kernels()[-1] if cpu.kernels() else None
    # On the CPU without a kernel, on a device whose decoding the CPU must do, and by each kernel.
    paths: list[tuple[cpu.CpuKernel | None, cpu.CpuKernel | None, Products | None]] = [
        (None, None, None), (None, best, None), *((kernel, kernel, None) for kernel in cpu.kernels()), *TRITON
    ]  # fmt: skip
    for name, whole in (("k", tiny.keys(77, first, seed=3)), ("v", tiny.values(77, seed=3))):
        x = whole.clone()
        x[1, 40, 0] *= 30
        encoded = encoded_in(basis, name, x.to(dtype), Hints(prefix_start=first == 0, position=first))
        found = []
        for kernel, host, products in paths:
            monkeypatch.setattr(module, "cpu_kernel", lambda _x, kernel=kernel: kernel)
            monkeypatch.setattr(module, "products_on", lambda _x, products=products: products)
            for of in (module, rans):
                monkeypatch.setattr(of, "host_kernel", lambda host=host: host)
            found.append(raw_bits(KVLearned().decode(encoded)))
        assert len(set(found)) == 1


@pytest.mark.skipif(not cpu.kernels(), reason="no compiled kernel here")
def test_what_goes_to_a_device_without_a_compiler_is_decoded_by_the_kernel_of_the_host(
    basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In plain torch a chunk takes seconds: a step for each coefficient."""
    encoded = encoded_in(basis, "v", tiny.values(64), Hints(prefix_start=False))
    monkeypatch.setattr(module, "cpu_kernel", lambda _x: None)
    monkeypatch.setattr(module, "_values", lambda *_: pytest.fail("in plain torch"))
    assert KVLearned().decode(encoded).shape == (4, 64, 2, 8)


@pytest.mark.parametrize("first", [0, 64, 256, 5000, 100_000, 131_071])
@pytest.mark.parametrize("tokens", [8, 16, 256])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_position_is_found_in_the_keys(first: int, tokens: int, interleaved: bool) -> None:
    """Of four layers, two of which turn by another base, as in Gemma 3."""
    bases = torch.tensor([1e4, 1e4, 1e6, 1e6], dtype=torch.float64)[:, None]
    rotation = Rotation(bases ** (-torch.arange(32, dtype=torch.float64) / 32), interleaved)
    g = torch.Generator().manual_seed(first)
    mean = torch.randn(4, 2, 64, generator=g)
    keys = rotation.turned(mean[:, None] + torch.randn(4, tokens, 2, 64, generator=g), first, back=False)
    assert rotation.position_of(keys, mean, torch.ones_like(mean)) == first
    assert torch.allclose(rotation.turned(keys, first, back=True).mean(dim=1), mean, atol=5 / tokens**0.5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("part", [1, 2, 4])
def test_how_keys_turn_is_measured_on_the_model(part: int, interleaved: bool) -> None:
    """Any base, half apart or neighbours, all channels or the first ones; keys that do not turn are left alone."""
    due = Rotation((7e4 ** (-torch.arange(32 // part, dtype=torch.float64) / 32)).repeat(3, 1), interleaved)
    before = torch.randn(3, 8, 2, 64, generator=torch.Generator().manual_seed(1))
    at = (0, 1, 4, 16, 64, 256, 1024)
    probes = [torch.stack([due.turned(x[:, None], p, back=False)[:, 0] for x in before.unbind(1)], dim=1) for p in at]
    found = measured(at, torch.stack(probes))
    for first in (3, 5000):
        turned = (rotation.turned(before, first, back=False) for rotation in (found, due))
        assert torch.allclose(*turned, atol=1e-3)
    assert len(torch.unique(found.angles, dim=0)) == 1
    still = measured(at, torch.stack([before + p for p in at]))
    assert still.angles.shape == (3, 0)
    assert torch.equal(still.turned(before, 77, back=True), before)


def test_a_position_that_was_told_is_not_looked_for(basis: Basis) -> None:
    x = tiny.keys(64, 640)
    assert encoded_in(basis, "k", x, Hints(position=640)).attrs["position"] == 640
    wrong = encoded_in(basis, "k", x, Hints(position=3))
    right = encoded_in(basis, "k", x)
    assert bits_a_value(wrong) > bits_a_value(right)
    for one in (wrong, right):
        assert float((KVLearned().decode(one) - x).norm() / x.norm()) < 0.2, "a wrong one costs bits, not values"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [True, False])
def test_what_was_decoded_is_encoded_into_the_same_bytes(basis: Basis, dtype: torch.dtype, start: bool) -> None:
    for name, x in (("k", tiny.keys(128, 0 if start else 128)), ("v", tiny.values(128))):
        once = encoded_in(basis, name, x.to(dtype), Hints(prefix_start=start))
        for _ in range(3):
            again = encoded_in(basis, name, KVLearned().decode(once), Hints(prefix_start=start, decoded=True))
            assert parts_of(again) == parts_of(once)
            assert again.attrs == once.attrs


def test_nothing_is_quantized_twice(basis: Basis) -> None:
    """A copy decoded from nf4-kv2 before there was a basis becomes the same nf4-kv2 again, not kv-learned of it."""
    x = {"k": tiny.keys(256, 256), "v": tiny.values(256)}
    hints = dict.fromkeys(x, Hints(prefix_start=False))
    for codec, due in ((codec_for("auto"), {"nf4-kv2"}), (learned(basis), {"kv-learned"})):
        first = encode_entry(raw_entry(KEY, x), codec, hints)
        assert {*first.encodings} == due
        copy = raw_entry(KEY, decode_entry(first), lossy=True, receipt=first.receipt)
        again = encode_entry(copy, learned(basis), hints)
        assert {*again.encodings} == due


@pytest.mark.parametrize(
    "x",
    [torch.randn(4, 64, 2, 16), torch.randn(3, 64, 2, 8), torch.randn(4, 64, 4, 8), torch.randn(4, 2, 64, 8)],
    ids=lambda x: str(tuple(x.shape)),
)
def test_what_is_not_of_the_model_is_encoded_as_without_a_basis(basis: Basis, x: torch.Tensor) -> None:
    assert learned(basis).encode("k", x, Hints(token_axis=-3 if x.shape[1] == 64 else -2)).encoding == "nf4-kv2"
    assert learned(basis).encode("state", tiny.keys(64)).encoding == "nf4"
    assert learned(basis).encode("k", tiny.keys(64), Hints(token_axis=-2)).encoding == "nf4"
    assert learned(basis).encode("k", tiny.keys(4)).encoding == "nf4", "too short to know its position"


def test_values_of_another_model_in_the_same_shape_never_cost_more_than_without_a_basis(basis: Basis) -> None:
    strange = 40 * torch.randn(4, 64, 2, 8, generator=torch.Generator().manual_seed(1))
    assert learned(basis).encode("v", strange).encoding == "nf4-kv2"
    with pytest.raises(CodecError, match="bits a value"):
        encoded_in(basis, "v", strange)
    with pytest.raises(CodecError, match="32767 steps"):
        encoded_in(basis, "v", strange * 1e9)


def test_outlying_values_come_back(basis: Basis) -> None:
    """Beyond what a class has symbols for, a value is written beside the stream."""
    x = tiny.values(64)
    x[2, 7] *= 60
    found = encoded_in(basis, "v", x, Hints(prefix_start=False))
    decoded = KVLearned().decode(found)
    assert float((decoded - x)[2, 7].norm() / x[2, 7].norm()) < 0.01
    assert float((decoded - x).abs().max()) < 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_raw(basis: Basis, bad: float) -> None:
    x = tiny.keys(64)
    x[1, 2, 0, 3] = bad
    assert encode_measured(learned(basis), "k", x) is None


def golden_cases() -> list[dict[str, object]]:
    """The encodings of tests/golden/kv-learned.json."""
    basis = use(read_basis(GOLDEN / "kv-learned.safetensors"))
    cases = []
    for name, first, dtype in (("k", 0, "float32"), ("k", 256, "bfloat16"), ("v", 0, "float16"), ("v", 256, "float32")):
        x = (tiny.keys(48, first) if name == "k" else tiny.values(48)).to(getattr(torch, dtype))
        found = encoded_in(basis, name, x, Hints(prefix_start=first == 0))
        parts = {suffix: [str(p.dtype)[6:], raw_bits(p).hex()] for suffix, p in found.parts.items()}
        decoded = KVLearned().decode(found)[:, ::16].float()
        cases.append({"dtype": dtype, "shape": [*x.shape], "attrs": dict(found.attrs), "parts": parts,
                      "decoded of every 16th token": [round(float(v), 5) for v in decoded.reshape(-1)]})  # fmt: skip
    return cases


def test_the_golden_encodings_are_read_as_they_were_written() -> None:
    basis = use(read_basis(GOLDEN / "kv-learned.safetensors"))
    cases = json.loads((GOLDEN / "kv-learned.json").read_text())
    assert len(cases) == 4
    for case in cases:
        assert case["attrs"]["basis"] == basis.digest
        parts = {
            suffix: torch.frombuffer(bytearray.fromhex(text), dtype=getattr(torch, kind))
            for suffix, (kind, text) in case["parts"].items()
        }
        encoded = EncodedTensor(TensorSpec(case["dtype"], tuple(case["shape"])), "kv-learned", parts, case["attrs"])
        decoded = KVLearned().decode(encoded)[:, ::16].float().reshape(-1)
        due = torch.tensor(case["decoded of every 16th token"])
        assert torch.allclose(decoded, due, rtol=2**-7 if case["dtype"] != "float32" else 1e-5, atol=1e-4)


def forged(encoded: EncodedTensor, **parts: torch.Tensor) -> EncodedTensor:
    held = {**encoded.parts, **{name.removeprefix("main"): part for name, part in parts.items()}}
    return EncodedTensor(encoded.spec, encoded.encoding, held, encoded.attrs)


def outcome(encoded: EncodedTensor) -> torch.Tensor | None:
    """What a decoder may do with any bytes: CodecError from both doors, or a finite tensor of the spec."""
    try:
        KVLearned().check(encoded)
    except CodecError:
        with pytest.raises(CodecError):
            KVLearned().decode(encoded)
        return None
    decoded = KVLearned().decode(encoded)
    assert tuple(decoded.shape) == encoded.spec.shape
    assert bool(torch.isfinite(decoded).all())
    return decoded


@cache
def sound(name: str, dtype: torch.dtype) -> EncodedTensor:
    """Sixteen tokens, with their basis in use."""
    x = tiny.keys(16) if name == "k" else tiny.values(16)
    return encoded_in(use(tiny.basis()), name, x.to(dtype))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=400), name=st.sampled_from("kv"))
def test_any_bytes_are_a_tensor_or_a_codec_error(data: bytes, name: str) -> None:
    encoded = sound(name, torch.float32)
    outcome(forged(encoded, main=torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)))


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.integers(0, 40), dtype=st.sampled_from(DTYPES))
def test_damaged_streams_are_a_tensor_or_a_codec_error(at: int, bit: int, cut: int, dtype: torch.dtype) -> None:
    encoded = sound("v", dtype)
    main = encoded.parts[""].clone()
    main[at % main.numel()] ^= 1 << bit
    outcome(forged(encoded, main=main))
    if cut:
        assert outcome(forged(encoded, main=encoded.parts[""][:-cut].clone())) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("basis", None), ("basis", "x"), ("basis", 5), ("basis", []), ("role", "keys"), ("role", None), ("role", []),
        ("kept", -1), ("kept", 48), ("kept", True), ("kept", 10**400), ("kept", None), ("position", -1),
        ("position", 1 << 60), ("position", 1.5), ("position", "0"),
    ],
    ids=str,
)  # fmt: skip
def test_attributes_that_no_encoder_writes_are_codec_errors(basis: Basis, name: str, value: object) -> None:
    encoded = encoded_in(basis, "k", tiny.keys(48))
    wrong = replace(encoded, attrs={**encoded.attrs, name: value})
    for reads in (KVLearned().check, KVLearned().decode):
        with pytest.raises(CodecError):
            reads(wrong)


@pytest.mark.parametrize(
    "shape", [(4, 48, 2, 16), (4, 47, 2, 8), (5, 48, 2, 8), (4, 48, 16), (4, 1 << 40, 2, 8)], ids=str
)
def test_a_shape_that_is_not_the_streams_is_a_codec_error_before_memory_is_made(
    basis: Basis, shape: tuple[int, ...]
) -> None:
    encoded = encoded_in(basis, "k", tiny.keys(48))
    with pytest.raises(CodecError):
        KVLearned().decode(replace(encoded, spec=TensorSpec("float32", shape)))


def test_what_would_decode_to_infinity_is_a_codec_error(basis: Basis) -> None:
    x = tiny.values(64)
    x[2, 7] *= 60
    encoded = encoded_in(basis, "v", x, Hints(prefix_start=False))
    main = encoded.parts[""].clone()
    main[-2:] = torch.tensor([255, 127], dtype=torch.uint8)
    huge = forged(replace(encoded, spec=TensorSpec("float16", encoded.spec.shape)), main=main)
    scaled = dict(basis.tensors)
    for at in range(2):
        scaled[f"v.{at}.scale"] = scaled[f"v.{at}.scale"] * 1e4
    other = use(made(basis.about, scaled))
    with pytest.raises(CodecError, match="not finite"):
        KVLearned().decode(replace(huge, attrs={**huge.attrs, "basis": other.digest}))


def test_without_its_basis_a_tensor_is_an_unknown_encoding_and_with_another_never_data(basis: Basis) -> None:
    encoded = encoded_in(basis, "k", tiny.keys(48))
    absent = replace(encoded, attrs={**encoded.attrs, "basis": "0" * 64})
    with pytest.raises(UnknownEncoding, match="store.warm.bases"):
        KVLearned().decode(absent)
    with pytest.raises(UnknownEncoding):
        decode_entry(Entry(KEY, {"k": absent}, lossy=True))
    foreign = use(tiny.basis(layers=6))
    with pytest.raises(CodecError, match="not of its basis"):
        KVLearned().decode(replace(encoded, attrs={**encoded.attrs, "basis": foreign.digest}))


def test_a_basis_is_known_as_long_as_somebody_uses_it() -> None:
    taught = tiny.learning(pieces=2)
    held = use(taught.basis(taught.at(0.7)))
    digest = held.digest
    assert with_digest(digest) is held
    assert use(from_bytes(held.to_bytes())) is held, "read twice, it is held once"
    del held, taught
    with pytest.raises(UnknownEncoding):
        with_digest(digest)


def test_a_damaged_basis_is_never_read(basis: Basis, tmp_path: Path) -> None:
    data = basis.to_bytes()
    assert from_bytes(data).digest == basis.digest
    g = torch.Generator().manual_seed(0)
    for at in [*range(0, 1500, 7), *torch.randint(0, len(data), (100,), generator=g).tolist()]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        try:
            found = from_bytes(bytes(damaged))
        except CodecError:
            continue
        assert found.digest == basis.digest
        assert parts_equal(found, basis), "what is read is what was written"
    for wrong in (b"", data[:100], data[:-1], data + b"\0", b"\xff" * 100, b"{}" * 50):
        with pytest.raises(CodecError):
            from_bytes(wrong)
    path = tmp_path / "b.safetensors"
    with pytest.raises(ConfigError, match="No such file"):
        read_basis(path)
    path.write_bytes(data[:-1])
    with pytest.raises(ConfigError, match=r"b\.safetensors is no basis"):
        read_basis(path)


def parts_equal(a: Basis, b: Basis) -> bool:
    return a.about == b.about and all(torch.equal(a.tensors[name], x) for name, x in b.tensors.items())


def saved(basis: Basis, directory: Path, name: str = "tiny.safetensors") -> str:
    path = directory / name
    path.write_bytes(basis.to_bytes())
    return str(path)


def config(directory: Path, bases: dict[str, str], codec: str = "kv-learned") -> StoreConfig:
    warm = WarmConfig(16 * MIB, codec=codec, bases=bases)
    return StoreConfig(HotConfig(16 * MIB), warm, ColdConfig(str(directory / "cold")), promote_after=0)


@pytest.mark.parametrize("tier", ["warm", "cold"])
def test_a_prefix_goes_through_a_tier_and_comes_back(tier: str, tmp_path: Path) -> None:
    k, v = tiny.keys(128), tiny.values(128)
    bases = {"*": saved(tiny.basis(), tmp_path)}
    with Store.open(config(tmp_path, bases), clock=ManualClock(), background=False, framework="torch") as store:
        space = store.namespace(
            model="tiny", revision="1", dtype="float32", layers=4, kv_heads=2, head_dim=8, layout="lthd",
            chunk_tokens=64,
        )  # fmt: skip
        ids = list(range(128))
        space.put_prefix(ids, k, v)
        for _ in range(1 if tier == "warm" else 2):
            store.demote(*space.keys(ids))
        hit = store.get(space.keys(ids)[1])
        assert hit is not None
        assert (hit.tier, hit.encoding, hit.lossy) == (tier, "kv-learned", True)
        assert all(0 < error < 0.5 for error in hit.receipt.values())
        n, got_k, got_v = space.get_prefix(ids)
    assert n == 128
    assert float((got_k - k).norm() / k.norm()) < 0.2
    assert float((got_v - v).norm() / v.norm()) < 0.2


def test_a_record_without_its_basis_is_a_miss_and_is_there_again_with_it(tmp_path: Path) -> None:
    taught = tiny.learning(pieces=2)
    first, other = (saved(taught.basis(taught.at(step)), tmp_path, f"{step}.safetensors") for step in (0.5, 0.8))

    def opened(bases: dict[str, str], codec: str) -> tuple[bool, bool]:
        """Whether the key is served, and whether it is held."""
        with Store.open(config(tmp_path, bases, codec), clock=ManualClock(), background=False) as store:
            if not store.locate([b"key"])[0]:
                store.put(b"key", {"k": tiny.keys(64)})
                store.demote(b"key")
                store.demote(b"key")
            return store.get(b"key") is not None, store.inspect(b"key") is not None

    assert opened({"*": first}, "kv-learned") == (True, True)
    gc.collect()  # the bases of a store that is closed are no longer in use
    assert opened({}, "auto") == (False, True), "nothing is thrown away for want of a basis"
    assert opened({"*": other}, "kv-learned") == (False, True)
    gc.collect()
    assert opened({"m": first}, "auto") == (True, True)


def test_a_basis_is_found_by_the_namespace_s_name(tmp_path: Path) -> None:
    path = saved(tiny.basis(), tmp_path)
    choice = CodecChoice(
        WarmConfig(bases={"model": path, "exact@00": path}, namespaces={"model": CodecPolicy("kv-learned")})
    )
    due = {"model@12": "kv-learned", "model": "kv-learned", "other@12": "nf4-kv2", "exact@00": "nf4-kv2"}
    x = tiny.keys(64)
    assert {name: choice.codec_of(name).encode("k", x).encoding for name in due} == due
    everywhere = CodecChoice(WarmConfig(codec="kv-learned", bases={"*": path}))
    assert everywhere.codec_of("").encode("k", x).encoding == "kv-learned"
    some = CodecChoice(WarmConfig(codec="kv-learned", bases={"model": path}))
    assert some.codec_of("other").encode("k", x).encoding == "nf4-kv2"


def rated(bits: float, kl: float, path: Path) -> str:
    """The file of a basis of the tiny model that says it was learned at a rate."""
    own = tiny.basis(bits)
    path.write_bytes(made(replace(own.about, bits=bits, kl_measured=kl), own.tensors).to_bytes())
    return str(path)


def test_a_namespace_states_bits_or_harm_and_its_basis_is_chosen_by_that(tmp_path: Path) -> None:
    coarse, fine = rated(2.5, 2e-3, tmp_path / "coarse"), rated(3.5, 3e-4, tmp_path / "fine")
    digests = {path: read_basis(path).digest for path in (coarse, fine)}
    x = tiny.keys(64)
    for named, other in ((coarse, fine), (fine, coarse)):
        for policy, due in (
            (CodecPolicy("kv-learned"), named),
            (CodecPolicy("kv-learned", bits=2.6), coarse),
            (CodecPolicy("kv-learned", bits=16), fine),
            (CodecPolicy("kv-learned", max_kl=5e-4), fine),
            (CodecPolicy("kv-learned", max_kl=0.1), coarse),
        ):
            choice = CodecChoice(WarmConfig(bases={"m": named, "another": other}, namespaces={"m": policy}))
            assert choice.codec_of("m@00").encode("k", x).attrs["basis"] == digests[due]


def test_a_rate_that_no_basis_keeps_is_refused_at_the_start(tmp_path: Path) -> None:
    path = rated(2.5, 2e-3, tmp_path / "basis")
    for policy, match in (
        (CodecPolicy("kv-learned", bits=2), r"warm\.namespaces\.m\.bits is 2, and the coarsest .* has 2\.5"),
        (CodecPolicy("kv-learned", max_kl=1e-3), r"max_kl is 0\.001, and the finest .* measured 0\.002"),
    ):
        held = config(tmp_path / "store", {"m": path})
        held = replace(held, warm=replace(held.warm, codec="auto", namespaces={"m": policy}))
        with pytest.raises(ConfigError, match=match):
            Store.open(held, background=False)


def test_what_was_decoded_from_one_rate_is_never_coded_at_another(tmp_path: Path) -> None:
    coarse, fine = (use(read_basis(rated(bits, 1e-3, tmp_path / str(bits)))) for bits in (2.5, 3.5))
    x = tiny.keys(64)
    first = encode_measured(learned(fine), "k", x)
    assert first is not None
    entry = raw_entry(KEY, {"k": KVLearned().decode(first)}, receipt={"k": first.relative_error})
    again = encode_entry(entry, learned(fine)).tensors["k"]
    assert parts_of(again) == parts_of(first)
    for rest in (Learned(coarse, codec_for("auto"), [fine]), Learned(fine, codec_for("auto"), [coarse])):
        assert parts_of(encode_entry(entry, rest).tensors["k"]) == parts_of(first)
        assert encode_entry(entry, rest).tensors["k"].attrs["basis"] == fine.digest
    alone = encode_entry(entry, learned(coarse)).tensors["k"]
    assert alone.encoding != "kv-learned", "without its basis it takes no second form of this kind"
    fresh = encode_entry(raw_entry(KEY, {"k": x}), Learned(coarse, codec_for("auto"), [fine])).tensors["k"]
    assert fresh.attrs["basis"] == coarse.digest


def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    layer = {"0-1": LayerCodec("int8")}
    for warm, match in (
        (WarmConfig(codec="kv-learned"), "warm.bases is empty"),
        (WarmConfig(namespaces={"m": CodecPolicy("kv-learned")}), r"warm\.namespaces\.m\.codec"),
        (WarmConfig(codec="kv-learned", bases={"*": "f"}, layers=layer), "contradict"),
        (WarmConfig(codec="kv-learned", bases={"*": "f"}, bits=2, max_kl=0.1), "contradict"),
        (WarmConfig(codec="kv-learned", bases={"*": "f"}, bits=17), r"warm\.bits must be from 0 to 16"),
        (WarmConfig(codec="kv-learned", bases={"*": "f"}, max_kl=-1), r"warm\.max_kl must be from 0 to 100"),
        (WarmConfig(bits=3), r"warm\.bits needs warm\.codec = 'kv-learned', got 'auto'"),
        (WarmConfig(bases={"*": "f"}, layers={"0": LayerCodec("kv-learned")}), "codes layers together"),
    ):
        with pytest.raises(ConfigError, match=match):
            StoreConfig(warm=warm)
    with pytest.raises(ConfigError, match=r"gone\.safetensors cannot be read"):
        Store.open(config(tmp_path, {"*": str(tmp_path / "gone.safetensors")}), background=False)
