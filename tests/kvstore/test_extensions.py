"""Policies and codecs from outside: registered or offered by a package, checked, and never believed to be ours."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from examples.extensions import LeastOften, RowFp8, main
from kvstore import StoreConfig, WarmConfig, extensions, register_codec, register_policy
from kvstore.codecs import CodecError, codec_named, decode_entry, encode_entry
from kvstore.codecs.raw import Raw
from kvstore.config import ColdConfig, HotConfig, LayerCodec
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor
from kvstore.errors import ConfigError
from kvstore.keys import Key
from kvstore.policies import policy_named
from kvstore.residency.transcode import raw_entry
from kvstore.store import Store
from kvstored.cli import cli

X = torch.randn(4, 64, 2, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    for registry in (extensions.POLICIES, extensions.CODECS):
        monkeypatch.setattr(registry, "_things", {})
        monkeypatch.setattr(registry, "_offered", {})
    codec_named.cache_clear()
    yield
    codec_named.cache_clear()


def offer(monkeypatch, registry, *points: tuple[str, str]) -> None:
    """As if installed packages offered these."""
    group = registry._group
    found = [importlib.metadata.EntryPoint(name, value, group) for name, value in points]
    monkeypatch.setattr(registry, "_offered", None)
    monkeypatch.setattr(extensions, "entry_points", lambda group: [p for p in found if p.group == group])


def open_store(path: Path | None = None, *, policy: str = "lru", codec: str = "auto", **warm) -> Store:
    config = StoreConfig(
        hot=HotConfig(1 << 20), warm=WarmConfig(1 << 20, codec=codec, **warm), policy=policy,
        cold=ColdConfig(path=str(path) if path else None),
    )  # fmt: skip
    return Store.open(config, background=False)


# Policies.


def test_a_registered_policy_says_what_leaves() -> None:
    register_policy("least-often", LeastOften)
    with open_store(policy="least-often") as store:
        nbytes = 200 << 10
        for name in (b"often", b"once", b"never"):
            store.put(name, {"x": torch.zeros(nbytes, dtype=torch.uint8)}, fidelity="exact")
        for name in (b"once", b"often", b"often"):
            assert store.get(name) is not None
        while store.locate([b"never"])[0]:
            store.put(b"%d" % store.stats().tiers["hot"].puts, {"x": torch.zeros(nbytes, dtype=torch.uint8)})
        assert None not in store.locate([b"often", b"once"])


@pytest.mark.parametrize("name", extensions.OWN_POLICIES)
def test_our_own_policies_pass_the_trial_that_others_must_pass(name: str) -> None:
    register_policy(f"again-{name}", policy_named(name))


def test_a_name_is_given_once_and_ours_never() -> None:
    register_policy("p", LeastOften)
    register_policy("p", LeastOften)
    with pytest.raises(ConfigError, match="a policy named 'p' is registered already"):
        register_policy("p", policy_named("arc"))
    with pytest.raises(ConfigError, match="'lru' is a policy of kvstored itself"):
        register_policy("lru", LeastOften)
    with pytest.raises(ConfigError, match="'nf4' is a codec of kvstored itself"):
        register_codec(renamed(RowFp8, "nf4"))
    with pytest.raises(ConfigError, match="1 to 32 letters"):
        register_codec(renamed(RowFp8, "x" * 33))
    with pytest.raises(ConfigError, match="1 to 64 letters"):
        register_policy("with a space", LeastOften)


class Forgetful(LeastOften):
    def forget(self, key):
        """Does not."""


class Ungrateful(LeastOften):
    def touch(self, keys):
        super().touch(keys)


class NoSoon(LeastOften):
    def track(self, key):
        self._uses[key] = 0


class Full(LeastOften):
    def __init__(self):
        self._uses = {b"x": 1}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Forgetful, "forget and evict must let go"), (Ungrateful, "NoneType"), (NoSoon, "unexpected keyword argument"),
        (Full, "a new one must be empty"), (3, "expected a class or function"), (object, "no attribute 'victim'"),
        (lambda needed: None, "missing 1 required"),
    ],
)  # fmt: skip
def test_what_is_no_policy_is_refused_by_name_and_reason(wrong, said: str) -> None:
    with pytest.raises(ConfigError, match=f"policy 'wrong': .*{said}"):
        register_policy("wrong", wrong)
    assert not extensions.POLICIES.knows("wrong")


def test_a_setting_that_nobody_offers_names_what_there_is() -> None:
    register_policy("mine", LeastOften)
    with pytest.raises(ConfigError, match="policy must be one of lru, arc, s3fifo, mine, got 'lfu'"):
        StoreConfig(policy="lfu")
    with pytest.raises(
        ConfigError, match=r"warm\.codec must be one of auto, nf4-kv2, nf4-kv, nf4, int8, raw, kv-learned, got 'fp9"
    ):
        StoreConfig(warm=WarmConfig(codec="fp9"))


# Codecs.


def renamed(kind: type, name: str, **changed):
    return type(kind.__name__, (kind,), {"name": name, **changed})()


def test_a_registered_codec_writes_and_reads_records_across_a_restart(tmp_path: Path) -> None:
    register_codec(RowFp8())
    with open_store(tmp_path, codec="row-fp8") as store:
        store.put(b"a", {"k": X, "n": torch.arange(100)})
    with open_store(tmp_path) as store:
        hit = store.get(b"a")
        assert (hit.encoding, hit.tier, hit.lossy) == ("row-fp8", "cold", True)
        assert 0 < (hit.tensors["k"] - X).norm() / X.norm() < 0.05
        assert 0 < hit.receipt["k"] < 0.1
        assert torch.equal(hit.tensors["n"], torch.arange(100))


def test_a_record_whose_codec_is_not_installed_is_a_miss_that_says_so_and_stays(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    register_codec(RowFp8())
    with open_store(tmp_path, codec="row-fp8") as store:
        for name in (b"a", b"b", b"c"):
            store.put(name, {"k": X})
    monkeypatch.setattr(extensions.CODECS, "_things", {})  # another process
    codec_named.cache_clear()
    with open_store(tmp_path) as store:
        assert store.get(b"a") is None
        assert f"key={b'a'.hex()}" in caplog.text
        assert "unknown encoding 'row-fp8'" in caplog.text
        assert "install or register that" in caplog.text
        assert store.promote(b"b") == 0
        assert list(store.read(store.plan([b"c"], accept={"row-fp8"}))) == [None]
        assert store.get(b"a") is None
        assert caplog.text.count("unknown encoding") == 1  # not at each get
        values = store.stats().values
        assert (values["misses_lost"], values["misses_corrupt"], values["hits"]) == (3, 0, 0)
    register_codec(RowFp8())
    with open_store(tmp_path) as store:
        assert [store.get(name) is not None for name in (b"a", b"b", b"c")] == [True, True, True]


def test_a_codec_that_ignores_out_fills_it_all_the_same_alone_and_in_layers() -> None:
    def decode(self, encoded, out=None):
        return RowFp8.decode(self, encoded)

    register_codec(renamed(RowFp8, "deaf", decode=decode))
    layers = {"0-1": LayerCodec("deaf"), "2": LayerCodec("raw")}
    for how in ({"codec": "deaf"}, {"codec": "deaf", "layers": layers}):
        with open_store(**how) as store:
            store.put(b"a", {"k": X})
            store.demote(b"a")
            out = {"k": torch.full_like(X, 7.0)}
            hit = store.get(b"a", out=out)
            assert hit.tier == "warm"
            assert torch.equal(out["k"], store.get(b"a").tensors["k"])
            assert (out["k"] - X).norm() / X.norm() < 0.05


def test_a_codec_that_says_it_loses_nothing_is_not_believed() -> None:
    class Quiet(Raw):
        name = "quiet"

        def encode(self, name, x, hints=None):
            exact = float(x.abs().max()) <= 2
            part = x.clone() if exact else x.half().float()
            spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape))
            return EncodedTensor(spec, self.name, {"": part})

    register_codec(Quiet())
    encoded = encode_entry(raw_entry(Key(b"a"), {"k": X}), codec_named("quiet"))
    assert encoded.receipt["k"] > 0
    assert encoded.lossy


def wrong(**changed):
    return type("Wrong", (RowFp8,), {"name": "wrong", **changed})()


def changes_input(self, name, x, hints=None):
    encoded = RowFp8.encode(self, name, x)
    x.zero_()
    return encoded


def other_encoding(self, name, x, hints=None):
    return Raw().encode(name, x)


def no_json(self, name, x, hints=None):
    encoded = RowFp8.encode(self, name, x)
    return EncodedTensor(encoded.spec, encoded.encoding, encoded.parts, {"f": object()})


def other_shape(self, encoded, out=None):
    return RowFp8.decode(self, encoded).reshape(-1)


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        (wrong(lossy="yes"), "lossy must be True or False"), (wrong(check=None), "no method check"),
        (wrong(decode=lambda self, encoded: None), "decode must take"),
        (wrong(encode=changes_input), "changes its input"),
        (wrong(encode=other_encoding), "EncodedTensor of its own encoding"), (wrong(encode=no_json), "JSON"),
        (wrong(decode=other_shape), "decode must return a tensor of that spec"), (wrong(lossy=False), "other numbers"),
        (wrong(encode=lambda self, name, x, hints=None: 1 // 0), "ZeroDivisionError"), (3, "expected a codec"),
        (wrong(name=7), "its attribute name"),
    ],
)  # fmt: skip
def test_what_is_no_codec_is_refused_with_the_reason(codec, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        register_codec(codec)
    assert not extensions.CODECS.names()


# What packages offer.


def test_what_a_package_offers_is_found_by_its_name_and_loaded_once_used(monkeypatch) -> None:
    offer(monkeypatch, extensions.POLICIES, ("least-often", "examples.extensions:LeastOften"))
    assert policy_named("least-often") is LeastOften
    offer(monkeypatch, extensions.CODECS, ("row-fp8", "examples.extensions:RowFp8"))
    with open_store(codec="row-fp8", policy="lru") as store:
        store.put(b"a", {"k": X})
        store.demote(b"a")
        assert store.get(b"a").encoding == "row-fp8"


def test_a_package_that_cannot_be_loaded_is_named_and_a_record_of_its_codec_is_undecodable(monkeypatch) -> None:
    offer(monkeypatch, extensions.POLICIES, ("gone", "no_such_module:Policy"))
    config = StoreConfig(policy="gone")
    with pytest.raises(ConfigError, match=r"the policy 'gone' of .*no_such_module:Policy.* cannot be loaded"):
        Store.open(config)
    offer(monkeypatch, extensions.CODECS, ("gone", "no_such_module:Codec"))
    with pytest.raises(CodecError, match=r"the codec 'gone' of .* cannot be loaded"):
        codec_named("gone")


def test_two_packages_that_offer_one_name_are_an_error_and_none_may_take_ours(monkeypatch) -> None:
    offer(
        monkeypatch, extensions.CODECS, ("row-fp8", "examples.extensions:RowFp8"), ("row-fp8", "other:Codec"),
        ("nf4", "other:Codec"),
    )  # fmt: skip
    with pytest.raises(CodecError, match=r"2 packages offer a codec 'row-fp8'"):
        codec_named("row-fp8")
    assert codec_named("nf4").__class__.__name__ == "NF4"
    offer(monkeypatch, extensions.CODECS, ("other-name", "examples.extensions:RowFp8"))
    with pytest.raises(CodecError, match="its attribute name is 'row-fp8'"):
        codec_named("other-name")


def test_packages_are_asked_once_however_many_unknown_names_are_met(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(extensions.CODECS, "_offered", None)
    monkeypatch.setattr(extensions, "entry_points", lambda group: asked.append(group) or [])
    for i in range(3):
        with pytest.raises(CodecError, match="unknown encoding"):
            codec_named(f"unknown{i}")
    assert asked == ["kvstored.codecs"]


@pytest.mark.parametrize(
    "reference", ["no_colon", ":Name", "module:", "no_such_module:X", "examples.extensions:Nothing"]
)
def test_a_reference_that_cannot_be_imported_says_so(reference: str) -> None:
    with pytest.raises(ConfigError, match=reference):
        extensions.imported(reference, "policy")


# The example.


def test_the_example_runs(capsys) -> None:
    main()
    assert "row-fp8 from cold" in capsys.readouterr().out


def test_simulate_takes_a_policy_by_module_and_name(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    # One block is asked for again and again, between others that come once: the least often used leave first.
    blocks = [[0] if i % 4 == 0 else [i] for i in range(400)]
    trace.write_text("".join(json.dumps({"timestamp": i, "hash_ids": b}) + "\n" for i, b in enumerate(blocks)))
    asked = ["simulate", str(trace), "--ram", "400MiB", "--json", "--policy"]
    hits = {}
    for name in ("lru", "examples.extensions:LeastOften"):
        done = CliRunner().invoke(cli, [*asked, name])
        assert done.exit_code == 0, done.output
        hits[name] = json.loads(done.output)["hits"]
    assert hits["examples.extensions:LeastOften"] >= hits["lru"] > 0
    refused = CliRunner().invoke(cli, [*asked, "examples.extensions:Nothing"])
    assert refused.exit_code == 2
    assert "examples.extensions:Nothing" in refused.stderr


def test_decoding_an_entry_of_an_outside_codec_gives_what_its_receipt_says() -> None:
    register_codec(RowFp8())
    entry = encode_entry(raw_entry(Key(b"a"), {"k": X}), codec_named("row-fp8"))
    decoded = decode_entry(entry)["k"]
    assert (decoded - X).norm() / X.norm() <= entry.receipt["k"] * 1.001
