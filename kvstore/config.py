"""One typed configuration: read once, checked, frozen.

A table of the TOML file is a dataclass here or in the daemon's settings; a key is a field. An unknown key is an error
that names the nearest one; a value out of range is an error that names the range. Nothing is corrected silently.
Sizes are bytes, as integers or text: "512MiB", "4GiB", "1.5GB".
"""

import difflib
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from kvstore import extensions
from kvstore.checks import check_choice, check_range
from kvstore.errors import ConfigError

MIB = 1 << 20
GIB = 1 << 30

POLICIES = extensions.OWN_POLICIES
"""Which key leaves a memory tier next; `policies` has one module for each. Others may be registered (`extensions`)."""
SPLITS = ("fixed", "auto")
ADMISSIONS = ("all", "reused", "ghost")
"""Which entries may be written to disk (`tiers.admission`)."""
SHARED_SCHEMES = ("valkey", "valkeys", "redis", "rediss", "s3")
CODECS = ("auto", "nf4-kv2", "nf4-kv", "nf4", "int8", "raw", "kv-learned")
LEARNED = "kv-learned"
"""The codec that needs a basis (`WarmConfig.bases`)."""
MAX_RELATIVE_ERROR = 0.25
"""The default bound of "auto", as a fraction of the content of keys and values (docs/codecs.md). SmolLM2, Gemma 3 and
all but the first layer of Qwen2.5-0.5B stay below 0.2 in nf4-kv; that layer is at 0.74 and spoils the answers."""
LAYERS_MAX = 1024
LAYER_RUNS_MAX = 8
"""The most runs of layers with one codec that a tensor is cut into."""

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}iB"] = 1 << (10 * _power)
    _UNITS[f"{_letter}B"] = 1000**_power
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

T = TypeVar("T")


def parse_nbytes(text: str | int) -> int:
    """Bytes of "512MiB", "1.5GB" or 4096. Raises ConfigError."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.fullmatch(str(text))
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f'not a size: {text!r}; write bytes as 1048576, "512MiB" or "4GiB"')
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class HotConfig:
    """The hot tier: tensors as put. device: "cpu", or "cuda:N" for a GPU's memory (docs/gpu.md)."""

    capacity_nbytes: int = GIB
    device: str = "cpu"


@dataclass(frozen=True)
class LayerCodec:
    """How some layers are encoded; the fields are those of `CodecPolicy`."""

    codec: str = "auto"
    max_relative_error: float = MAX_RELATIVE_ERROR


@dataclass(frozen=True)
class CodecPolicy:
    """How entries that need not stay exact are encoded when they leave hot.

    codec: "auto" is nf4-kv2 for keys and values and nf4 for the rest. max_relative_error: with "auto", layers whose
    receipt is over this become int8 or stay exact; a fraction of the content (docs/codecs.md); 0: no bound.
    layers: other codecs by layer, "3" or "0-3", for keys and values of (layers, tokens, heads, dim) tensors and for
    names such as "layers.3.k". bits, max_kl: with "kv-learned", of all bases of the model the finest of at most so many
    bits a value, or the coarsest of at most so many nats a token, as measured when it was learned; 0: the basis named.
    """

    codec: str = "auto"
    max_relative_error: float = MAX_RELATIVE_ERROR
    layers: Mapping[str, LayerCodec] = field(default_factory=dict)
    bits: float = 0.0
    max_kl: float = 0.0


@dataclass(frozen=True)
class Rate:
    """What a form may cost: at most so many bits a value, or so many nats a token as measured when its basis was
    learned. 0: unsaid.
    """

    bits: float = 0.0
    max_kl: float = 0.0


@dataclass(frozen=True)
class WarmConfig:
    """The warm tier: encoded tensors in memory. 0 bytes: no warm tier.

    codec, max_relative_error, layers, bits, max_kl: the store's `CodecPolicy`. namespaces: the policies of namespaces,
    by the name that the caller gave, or by the part before its "@". bases: the file of the basis of each namespace, by
    the same names or "*", that "kv-learned" encodes with; every one of them decodes.
    """

    capacity_nbytes: int = 2 * GIB
    codec: str = "auto"
    max_relative_error: float = MAX_RELATIVE_ERROR
    layers: Mapping[str, LayerCodec] = field(default_factory=dict)
    namespaces: Mapping[str, CodecPolicy] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=dict)
    bits: float = 0.0
    max_kl: float = 0.0


@dataclass(frozen=True)
class ColdConfig:
    """The cold tier: records in segment files under `path`, indexed by LMDB. No path: no cold tier.

    write_buffer_nbytes: bytes of demoted entries that wait for the writer. flush_interval_s: seconds between writes of
    deadlines and recency, which move with every get. admission: which entries are written: "all"; "reused", those that
    were hit at least once (about a tenth of the writes for two thirds of the hits); "ghost", also those that left
    lately and were put again. write_nbytes_per_day: after so many bytes only entries that were hit are written; 0: no
    budget. free_min_fraction: share of the file system that stays free: the tier shrinks before the disk is full.
    key_files: records are encrypted with the key in this file; by namespace, tenant, TENANT/NAMESPACE or "*".
    bits, max_kl: a `Rate`: what kv-learned holds sinks into cold in a coarser basis that keeps it (docs/codecs.md).
    namespaces: the rates of namespaces, by the names that `WarmConfig` has.
    """

    path: str | None = None
    capacity_nbytes: int = 16 * GIB
    write_buffer_nbytes: int = 64 * MIB
    flush_interval_s: float = 30.0
    admission: str = "all"
    write_nbytes_per_day: int = 0
    free_min_fraction: float = 0.02
    key_files: Mapping[str, str] = field(default_factory=dict)
    bits: float = 0.0
    max_kl: float = 0.0
    namespaces: Mapping[str, Rate] = field(default_factory=dict)


@dataclass(frozen=True)
class SharedConfig:
    """A store outside that several hosts share: Valkey, Redis or S3. No url: none.

    url: valkey://HOST:PORT[,HOST:PORT...], valkeys:// (TLS), redis://, rediss:// or s3://BUCKET/PREFIX, without a
    secret in it. credentials_file: user and password, or the keys of S3. secret_file: 64 hexadecimal digits, the same
    on all hosts: what names are derived from. key_files: records are encrypted, as with `cold.key_files`. clear: they
    are not, which has to be said. ttl_s: seconds that an object is kept. lookup_s, fetch_s: seconds that a get waits
    for the question and for the values. tokens_min: shorter prefixes are neither published nor asked for. admission:
    which chunks are published: "all"; "reused", those that were hit here; "ghost", also those that left a tier lately
    and were put again. write_nbytes_per_day: after so many bytes only chunks that were hit are published; 0: no budget.
    buffer_nbytes: bytes of records that wait to be published; the oldest are dropped. piece_nbytes: longer values are
    sent in pieces of this. exact: chunks that must stay exact are published, too. prefill_tokens_per_s: how fast the
    model computes them: what arrives more slowly is not fetched; 0: unknown. ca_file, cert_file, key_file: PEM files
    for TLS.
    """

    url: str = ""
    credentials_file: str = ""
    secret_file: str = ""
    key_files: Mapping[str, str] = field(default_factory=dict)
    clear: bool = False
    ttl_s: float = 3600.0
    lookup_s: float = 0.02
    fetch_s: float = 2.0
    tokens_min: int = 512
    admission: str = "all"
    write_nbytes_per_day: int = 0
    buffer_nbytes: int = 256 * MIB
    piece_nbytes: int = 2 * MIB
    exact: bool = False
    prefill_tokens_per_s: float = 0.0
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def __post_init__(self) -> None:
        check_range("store.shared.ttl_s", self.ttl_s, 1, 365 * 86400.0)
        check_range("store.shared.lookup_s", self.lookup_s, 0.001, 60)
        check_range("store.shared.fetch_s", self.fetch_s, 0.001, 600)
        check_range("store.shared.tokens_min", self.tokens_min, 0, 1 << 30)
        check_choice("store.shared.admission", self.admission, ADMISSIONS)
        check_range("store.shared.write_nbytes_per_day", self.write_nbytes_per_day, 0, 1 << 60)
        check_range("store.shared.buffer_nbytes", self.buffer_nbytes, MIB, 1 << 40)
        check_range("store.shared.piece_nbytes", self.piece_nbytes, 64 << 10, 512 * MIB)
        check_range("store.shared.prefill_tokens_per_s", self.prefill_tokens_per_s, 0, 1e9)
        if not self.url:
            self._check_off()
        else:
            self._check_on()

    def _check_off(self) -> None:
        told = [f.name for f in fields(self) if f.default is not MISSING and getattr(self, f.name) != f.default]
        if told or self.key_files:
            raise ConfigError(f"store.shared.{(told or ['key_files'])[0]} is set and store.shared.url is not")

    def _check_on(self) -> None:
        scheme, colon, rest = self.url.partition("://")
        if not colon or scheme not in SHARED_SCHEMES or not rest:
            schemes = ", ".join(f"{known}://" for known in SHARED_SCHEMES)
            raise ConfigError(f"store.shared.url must begin with one of {schemes}, got {scheme!r:.40}")
        if "@" in rest.partition("/")[0]:  # and is not shown: it has a password in it
            raise ConfigError(
                "store.shared.url has a user or password in it: put them in store.shared.credentials_file"
            )
        if not self.secret_file:
            raise ConfigError("store.shared.secret_file is missing: the names in the shared store are derived from it")
        if self.clear and self.key_files:
            raise ConfigError("store.shared.clear = true and store.shared.key_files contradict each other: set one")
        if not self.clear and not self.key_files:
            raise ConfigError(
                "store.shared.key_files is missing: whoever reads the shared store would read the prompts' keys and "
                'values; name a file, key_files = { "*" = FILE }, or set clear = true'
            )
        if bool(self.cert_file) != bool(self.key_file):
            raise ConfigError("store.shared.cert_file and store.shared.key_file belong together: set both or neither")


@dataclass(frozen=True)
class QuotaConfig:
    """The bytes of each tier that one tenant or namespace may hold. None: no limit, only fair eviction.

    shared_nbytes_per_day: of a tenant alone: as `shared.write_nbytes_per_day`, of this tenant's chunks.
    """

    hot_nbytes: int | None = None
    warm_nbytes: int | None = None
    cold_nbytes: int | None = None
    shared_nbytes_per_day: int | None = None


@dataclass(frozen=True)
class StoreConfig:
    """The whole engine.

    ttl_s: default seconds to live, sliding. ttl_max_s: the longest ttl_s of a put. promote_after: the hit within
    promote_window_s that copies an entry to hot: 1, 2 or 0 for never. entry_max_nbytes: decoded bytes of one entry.
    pin_max_fraction: share of a tier that pinned entries may take. sweep_interval_s: seconds between collections of
    expired entries (they are never returned, collected or not). policy: which key leaves a memory tier next: "lru",
    "arc" or "s3fifo". split: "fixed": hot and warm keep their budgets; "auto": they share them, and the border is
    learned. quotas: by tenant. namespaces: quotas of namespaces, in each tenant: by the name that the caller gave, or
    by the part before its "@" (the model, for the prefix layer's namespaces).
    """

    hot: HotConfig = field(default_factory=HotConfig)
    warm: WarmConfig = field(default_factory=WarmConfig)
    cold: ColdConfig = field(default_factory=ColdConfig)
    shared: SharedConfig = field(default_factory=SharedConfig)
    ttl_s: float = 3600.0
    ttl_max_s: float = 30 * 86400.0
    promote_after: int = 2
    promote_window_s: float = 60.0
    entry_max_nbytes: int = 2 * GIB
    pin_max_fraction: float = 0.5
    sweep_interval_s: float = 1.0
    policy: str = "lru"
    split: str = "fixed"
    quotas: Mapping[str, QuotaConfig] = field(default_factory=dict)
    namespaces: Mapping[str, QuotaConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_range("hot.capacity_nbytes", self.hot.capacity_nbytes, 1, 1 << 50)
        check_range("warm.capacity_nbytes", self.warm.capacity_nbytes, 0, 1 << 50)
        check_range("cold.capacity_nbytes", self.cold.capacity_nbytes, 1 * MIB, 1 << 50)
        check_range("cold.write_buffer_nbytes", self.cold.write_buffer_nbytes, 1, 1 << 40)
        check_range("cold.flush_interval_s", self.cold.flush_interval_s, 0.01, 86400)
        check_range("cold.write_nbytes_per_day", self.cold.write_nbytes_per_day, 0, 1 << 60)
        check_range("cold.free_min_fraction", self.cold.free_min_fraction, 0, 0.9)
        check_range("ttl_max_s", self.ttl_max_s, 0.001, 100 * 365 * 86400.0)
        check_range("ttl_s", self.ttl_s, 0.001, self.ttl_max_s)
        check_range("promote_after", self.promote_after, 0, 2)
        check_range("promote_window_s", self.promote_window_s, 0, 86400)
        check_range("entry_max_nbytes", self.entry_max_nbytes, 1, 4 * GIB)
        check_range("pin_max_fraction", self.pin_max_fraction, 0, 1)
        check_range("sweep_interval_s", self.sweep_interval_s, 0.001, 3600)
        for table, quotas in (("quotas", self.quotas), ("namespaces", self.namespaces)):
            for name, quota in quotas.items():
                for limit, nbytes in vars(quota).items():
                    if nbytes is not None:
                        check_range(f"{table}.{name}.{limit}", nbytes, 0, 1 << 50)
            self._check_shared_quotas(table, quotas)
        check_choice("cold.admission", self.cold.admission, ADMISSIONS)
        _check_known("policy", self.policy, POLICIES, extensions.POLICIES)
        check_choice("split", self.split, SPLITS)
        policies: list[tuple[str, CodecPolicy | WarmConfig]] = [("", self.warm), *self.warm.namespaces.items()]
        for name, policy in policies:
            where = f"warm.namespaces.{name}" if name else "warm"
            check_codecs(where, policy)
            _check_learned(where, policy, self.warm.bases)
        _check_rate("cold", self.cold)
        for name, rate in self.cold.namespaces.items():
            _check_rate(f"cold.namespaces.{name}", rate)
        if (self.cold.bits or self.cold.max_kl) and all(policy.codec != LEARNED for _name, policy in policies):
            raise ConfigError(f"cold.{'bits' if self.cold.bits else 'max_kl'} needs a codec {LEARNED!r} in warm")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.hot.device):
            raise ConfigError(f'hot.device is "cpu" or "cuda:N", got {self.hot.device!r}')
        if self.hot.device != "cpu" and self.split != "fixed":
            raise ConfigError(
                f"split = {self.split!r} and hot.device = {self.hot.device!r} contradict each other: a border between "
                'hot and warm that moves would give bytes of RAM to the GPU; set split = "fixed"'
            )

    def _check_shared_quotas(self, table: str, quotas: Mapping[str, QuotaConfig]) -> None:
        for name, quota in quotas.items():
            if quota.shared_nbytes_per_day is None:
                continue
            setting = f"{table}.{name}.shared_nbytes_per_day"
            if table != "quotas":
                raise ConfigError(f"{setting} is a limit of tenants: set quotas.TENANT.shared_nbytes_per_day")
            if not self.shared.url:
                raise ConfigError(f"{setting} is set and store.shared.url is not")
            check_range(setting, quota.shared_nbytes_per_day, 1, 1 << 60)


def with_budgets(
    config: StoreConfig, *, hot: int | str | None, warm: int | str | None, cold: int | str | None, ttl_s: float | None
) -> StoreConfig:
    """A configuration with other budgets, as bytes or as text ("8GiB"), and another TTL; None: as it was.

    Raises ConfigError, also for a cold tier without a directory.
    """
    if cold is not None and config.cold.path is None:
        raise ConfigError(f"cold={cold!r} needs a directory to write to: Store.open(PATH, cold=...)")
    tiers = {
        name: replace(tier, capacity_nbytes=_budget(name, size))
        for name, tier, size in (("hot", config.hot, hot), ("warm", config.warm, warm), ("cold", config.cold, cold))
        if size is not None
    }
    return replace(config, **tiers, **({} if ttl_s is None else {"ttl_s": ttl_s}))  # type: ignore[arg-type]  # by name


def _budget(name: str, size: int | str) -> int:
    try:
        return parse_nbytes(size)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


LIVE = frozenset({"hot.capacity_nbytes", "warm.capacity_nbytes", "cold.capacity_nbytes", "ttl_s"})
"""Settings of a store that may change while it is open."""


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting of a configuration dataclass, by its name in the file ("hot.capacity_nbytes")."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, value


def differing(old: Any, new: Any) -> list[str]:
    """The names of the settings in which two configurations of one kind differ."""
    return [name for (name, a), (_, b) in zip(leaves(old), leaves(new), strict=True) if a != b]


def check_live(old: Any, new: Any, live: Collection[str]) -> list[str]:
    """The names of the settings that differ. Raises ConfigError if one of them cannot change while it is in use."""
    changed = differing(old, new)
    fixed = [name for name in changed if name not in live]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} cannot change while the store is open; what can: {', '.join(sorted(live))}"
        )
    return changed


def layer_range(text: str) -> range:
    """The layers of "3" or "0-3". Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < LAYERS_MAX:
        raise ConfigError(f'layers are "3" or "0-3", at most {LAYERS_MAX - 1}, got {text!r}')
    return range(first, last + 1)


def check_codecs(name: str, policy: CodecPolicy | WarmConfig) -> None:
    """Raise ConfigError, naming the setting, unless a codec policy makes sense."""
    by_layer = {
        f"{name}.layers.{text}": (choice.codec, choice.max_relative_error) for text, choice in policy.layers.items()
    }
    for where, (codec, bound) in {name: (policy.codec, policy.max_relative_error), **by_layer}.items():
        _check_known(f"{where}.codec", codec, CODECS, extensions.CODECS)
        check_range(f"{where}.max_relative_error", bound, 0, 0.99)
    chosen: dict[int, tuple[str, float]] = {}
    for text, choice in policy.layers.items():
        for layer in layer_range(text):
            if layer in chosen:
                raise ConfigError(f"{name}.layers: layer {layer} is named twice")
            chosen[layer] = choice.codec, choice.max_relative_error
    rest = policy.codec, policy.max_relative_error
    order = [chosen.get(layer, rest) for layer in range(max(chosen, default=-1) + 2)]
    runs = 1 + sum(a != b for a, b in pairwise(order))
    if runs > LAYER_RUNS_MAX:
        raise ConfigError(f"{name}.layers makes {runs} runs of alike layers, at most {LAYER_RUNS_MAX}")


def _check_learned(name: str, policy: CodecPolicy | WarmConfig, bases: Mapping[str, str]) -> None:
    """Raise ConfigError for a policy of kv-learned without any basis, or by layer: its layers are coded together."""
    by_layer = [text for text, choice in policy.layers.items() if choice.codec == LEARNED]
    if by_layer:
        raise ConfigError(f"{name}.layers.{by_layer[0]}.codec cannot be {LEARNED}: it codes layers together")
    if policy.codec == LEARNED and policy.layers:
        raise ConfigError(f"{name}.layers and {name}.codec = {LEARNED!r} contradict each other: it codes all layers")
    if policy.codec == LEARNED and not bases:
        raise ConfigError(
            f'{name}.codec is {LEARNED} and warm.bases is empty: kvstored learn makes a basis, bases = {{ "*" = FILE }}'
        )
    _check_rate(name, policy)
    if (policy.bits or policy.max_kl) and policy.codec != LEARNED:
        raise ConfigError(
            f"{name}.{'bits' if policy.bits else 'max_kl'} needs {name}.codec = {LEARNED!r}, got {policy.codec!r}: "
            "other codecs have one rate each"
        )


def _check_rate(name: str, rate: CodecPolicy | WarmConfig | ColdConfig | Rate) -> None:
    check_range(f"{name}.bits", rate.bits, 0, 16)
    check_range(f"{name}.max_kl", rate.max_kl, 0, 100)
    if rate.bits and rate.max_kl:
        raise ConfigError(f"{name}.bits and {name}.max_kl contradict each other: one of them chooses the basis")


def _check_known(name: str, value: object, own: Sequence[str], others: extensions.Registry[Any]) -> None:
    """As `check_choice`, of what may also be registered from outside."""
    if value not in own and not others.knows(value):
        check_choice(name, value, (*own, *others.names()))


def from_mapping(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """A configuration dataclass from a parsed TOML table. Raises ConfigError for unknown keys and wrong types."""
    assert is_dataclass(cls)
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {where}{close[0]}?" if close else f"; known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown setting {where}{key}{hint}")
        values[key] = convert(hints[key], value, f"{where}{key}")
    missing = [n for n, f in known.items() if n not in values and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"missing setting {where}{missing[0]}")
    return cls(**values)


def convert(hint: Any, value: Any, name: str) -> Any:
    """A value of a TOML file or of the environment as the type of a setting. Raises ConfigError, naming it."""
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a table of settings, got {value!r}")
        return from_mapping(hint, value, f"{name}.")
    if get_origin(hint) is Mapping:
        return _convert_tables(get_args(hint)[1], value, name)
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if bool in options and (isinstance(value, bool) or value in ("true", "false")):
        return value is True or value == "true"
    if int in options and name.endswith("nbytes"):
        return parse_nbytes(value)
    if str in options and isinstance(value, str):
        return value
    for kind in (int, float):
        # TOML has numbers, the environment has text. 1.5 is not an integer, true is not a number.
        fits = isinstance(value, str | int | kind) and not isinstance(value, bool)
        if kind in options and fits:
            try:
                return kind(value)
            except ValueError:
                break
    kinds = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"{name} must be {kinds}, got {value!r}")


def _convert_tables(hint: Any, value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is a table of tables, got {value!r}")
    return {key: convert(hint, inner, f"{name}.{key}") for key, inner in value.items()}


def read_toml(path: str | Path) -> dict[str, Any]:
    """A parsed TOML file. Raises ConfigError, naming the file and the line."""
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
