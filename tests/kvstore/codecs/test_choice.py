"""Which codec an entry below hot gets: by its namespace and by layer."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.codecs.choice import CodecChoice
from kvstore.codecs.hints import NO_HINTS
from kvstore.codecs.int8 import Int8
from kvstore.codecs.layers import Layers, encode_runs
from kvstore.codecs.nf4 import relative_error
from kvstore.codecs.nf4_kv import NF4KV
from kvstore.codecs.raw import Raw
from kvstore.config import CodecPolicy, ColdConfig, HotConfig, LayerCodec, StoreConfig, WarmConfig, from_mapping
from kvstore.errors import CodecError, ConfigError
from kvstore.store import Store
from tests.conftest import ROOT, environment

MIB = 1 << 20
K = torch.randn(6, 64, 2, 64, generator=torch.Generator().manual_seed(3))


def opened(warm, tmp_path):
    config = StoreConfig(HotConfig(16 * MIB), warm, ColdConfig(str(tmp_path)))
    return Store.open(config, clock=ManualClock(), background=False)


def test_named_layers_are_encoded_as_named_and_the_others_as_the_store_s(tmp_path):
    """The first two exactly, the third in 8 bits, the rest in nf4-kv: in warm, on disk and after a trip up."""
    warm = WarmConfig(16 * MIB, layers={"0-1": LayerCodec("raw"), "2": LayerCodec("int8")})
    with opened(warm, tmp_path) as store:
        store.put(b"key", {"k": K, "v": -K, "ids": torch.arange(64)})
        store.demote(b"key")
        first = store.get(b"key")
        assert (first.tier, first.encoding, first.lossy) == ("warm", "layers", True)
        k = first.tensors["k"]
        assert torch.equal(k[:2], K[:2])
        assert 0.002 < relative_error(K[2], k[2]) < 0.01
        assert 0.02 < relative_error(K[3:], k[3:]) < 0.12
        heads = (K - k)[3:].square().sum(dim=(1, 3)) / (K - K.mean(dim=1, keepdim=True))[3:].square().sum(dim=(1, 3))
        assert first.receipt["k"] == pytest.approx(float(heads.max().sqrt()), rel=0.1)
        assert torch.equal(first.tensors["ids"], torch.arange(64))
        store.demote(b"key")
        cold = store.get(b"key")
        assert (cold.tier, cold.receipt) == ("cold", first.receipt)
        assert torch.equal(cold.tensors["k"], k)
        store.promote(b"key")
        hot = store.get(b"key")
        assert (hot.tier, hot.receipt) == ("hot", first.receipt)
        assert torch.equal(hot.tensors["v"], first.tensors["v"])


def test_a_namespace_has_a_policy_of_its_own_by_its_name_or_its_model(tmp_path):
    policies = {"exacting": CodecPolicy(max_relative_error=0.02), "mixed@00": CodecPolicy("int8")}
    with opened(WarmConfig(16 * MIB, namespaces=policies), tmp_path) as store:
        due = {"": "nf4-kv2", "exacting@ab": "int8", "exacting": "int8", "mixed@00": "int8", "mixed@01": "nf4-kv2"}
        for name, encoding in due.items():
            key = name.encode() or b"none"
            store.put(key, {"k": K}, namespace=name)
            store.demote(key)
            assert store.get(key).encoding == encoding, name


def test_layers_of_a_namespace_replace_the_store_s(tmp_path):
    policy = CodecPolicy("raw", layers={"3-5": LayerCodec()})
    with opened(WarmConfig(16 * MIB, namespaces={"m": policy}), tmp_path) as store:
        store.put(b"key", {"k": K}, namespace="m@1")
        store.demote(b"key")
        k = store.get(b"key").tensors["k"]
        assert torch.equal(k[:3], K[:3])
        assert not torch.equal(k[3:], K[3:])


def test_layers_that_are_all_alike_are_one_encoding():
    codec = CodecChoice(WarmConfig(layers={"0-9": LayerCodec("int8")})).codec_of("")
    assert codec.encode("k", K).encoding == "int8"
    other = CodecChoice(WarmConfig(layers={"7": LayerCodec("int8")})).codec_of("")
    assert other.encode("k", K).encoding == "nf4-kv2"


def test_a_layer_in_the_name_counts_where_each_layer_has_a_key():
    codec = CodecChoice(WarmConfig(layers={"3": LayerCodec("int8")})).codec_of("")
    assert codec.encode("layers.3.k", K[0]).encoding == "int8"
    assert codec.encode("layers.4.k", K[0]).encoding == "nf4-kv2"


def test_a_bound_for_some_layers_is_kept_by_them():
    codec = CodecChoice(WarmConfig(layers={"0-1": LayerCodec(max_relative_error=0.01)})).codec_of("")
    decoded = Layers().decode(codec.encode("k", K))
    assert relative_error(K[:2], decoded[:2]) <= 0.01 < relative_error(K[2:], decoded[2:])


def test_settings_are_read_from_tables():
    table = {"warm": {"layers": {"0-1": {"codec": "int8"}}, "namespaces": {"m": {"layers": {"5": {"codec": "raw"}}}}}}
    warm = from_mapping(StoreConfig, table).warm
    assert warm.layers == {"0-1": LayerCodec("int8")}
    assert warm.namespaces == {"m": CodecPolicy(layers={"5": LayerCodec("raw")})}


@pytest.mark.parametrize(
    "layers",
    [
        {"one": LayerCodec()},
        {"3-1": LayerCodec()},
        {"0-9999": LayerCodec()},
        {"0": LayerCodec("int8"), "0-1": LayerCodec("int8")},
        {"0": LayerCodec("nf5")},
        {"0": LayerCodec(max_relative_error=1.5)},
        {str(n): LayerCodec("int8") for n in range(0, 20, 2)},
    ],
    ids=str,
)
def test_layers_that_make_no_sense_are_refused(layers):
    for warm in (WarmConfig(layers=layers), WarmConfig(namespaces={"m": CodecPolicy(layers=layers)})):
        with pytest.raises(ConfigError, match="layers"):
            StoreConfig(warm=warm)


def coded():
    return encode_runs("k", K, NO_HINTS, [(0, 2, Raw()), (2, 3, Int8()), (3, 6, NF4KV())])


@pytest.mark.parametrize(
    "runs",
    [
        None,
        "runs",
        [],
        [[0, 6, "layers", {}]],
        [[0, 6, "unknown", {}]],
        [[0, 2, "raw", {}], [3, 6, "nf4-kv", {}]],
        [[0, 2, "raw", {}], [2, 2, "raw", {}], [2, 6, "raw", {}]],
        [[-1, 6, "raw", {}]],
        [[0, 7, "raw", {}]],
        [[0, 6, "raw"]],
        [[0, 6, "raw", []]],
        [[0, 6, "raw", {}]] * 9,
        [["0", 6, "raw", {}]],
    ],
    ids=str,
)
def test_runs_that_do_not_cover_the_layers_raise(runs):
    with pytest.raises(CodecError):
        Layers().decode(replace(coded(), attrs={"runs": runs}))


def test_parts_that_are_missing_or_of_another_run_raise():
    whole = coded()
    assert Layers().decode(whole).shape == K.shape
    for suffix in whole.parts:
        rest = {name: part for name, part in whole.parts.items() if name != suffix}
        with pytest.raises(CodecError):
            Layers().decode(replace(whole, parts=rest))
    swapped = {**whole.parts, "0": whole.parts["1"]}
    with pytest.raises(CodecError):
        Layers().decode(replace(whole, parts=swapped))
    with pytest.raises(CodecError):
        Layers().decode(replace(whole, parts={}))


@pytest.mark.parametrize("layout", [(1, 3, 128, 64), (8, 96, 64), (1, 128, 3, 64)], ids=str)
@pytest.mark.parametrize("name", ["layers.0.k", "layers.0.v"])
def test_a_codec_that_is_named_finds_the_tokens_of_a_layer_as_auto_does(layout, name):
    """Heads before rows, as a pressed cache is put: named, nf4-kv took three heads for tokens and kept one whole."""
    x = torch.randn(layout, generator=torch.Generator().manual_seed(1))
    named, auto = (CodecChoice(WarmConfig(codec=codec)).codec_of("").encode(name, x) for codec in ("nf4-kv2", "auto"))
    assert (named.encoding, named.attrs) == (auto.encoding, auto.attrs)
    assert all(torch.equal(part, auto.parts[suffix]) for suffix, part in named.parts.items())
    assert 8 * sum(part.nbytes for part in named.parts.values()) < 4.7 * x.numel()


WITHOUT_FILES = """
import resource, torch
from kvstore import kernels
from kvstore.codecs import codec_for, codec_named, encode_measured
codec = codec_for(NAME)
x = torch.randn(2, 66, 2, 32, generator=torch.Generator().manual_seed(0))
kernels.cpu_kernel(x), kernels.kv_kernel(x.device)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
try:
    open("/dev/null")
except OSError:
    measured = encode_measured(codec, "k", x)
    assert codec_named(measured.encoding).decode(measured).shape == x.shape
    print("encoded")
"""


@pytest.mark.parametrize("name", ["auto", "nf4-kv2", "nf4-kv", "nf4", "int8"])
def test_a_codec_opens_no_file_at_its_first_use(name):
    """np.median imports a module when it is first called: in a process out of descriptors a put ended with that."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FILES.replace("NAME", repr(name))],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "encoded\n", done.stderr
