"""Messages of the proto to and from the plain objects of `kvstore`: the part both ends need. No I/O, no state."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from math import inf
from typing import Any

from kvstore.dtypes import BY_NAME, BY_WIRE
from kvstore.errors import InvalidEntry
from kvstore.hit import PRIORITIES, EntryInfo, Explanation, Fidelity, Form, Held, Priority, TensorInfo
from kvstore.lookup import Lookup, check_lookup
from kvstore.stats import Setting, Stats, TierStats
from kvstored_client.wire._pb import cache_pb2 as pb

TIER_NAMES = {pb.TIER_HOT: "hot", pb.TIER_WARM: "warm", pb.TIER_COLD: "cold"}
TIERS = {name: number for number, name in TIER_NAMES.items()}
_PLACES = {**TIER_NAMES, pb.TIER_SHARED: "shared"}
_PLACE_NUMBERS = {name: number for number, name in _PLACES.items()}
_FIDELITIES: dict[str, pb.Fidelity] = {"auto": pb.FIDELITY_AUTO, "exact": pb.FIDELITY_EXACT}
_TIER_COUNTS = (
    "entries",
    "used_nbytes",
    "capacity_nbytes",
    "hits",
    "puts",
    "evictions",
    "demotions",
    "promotions",
)
PAYLOAD_BYTES_PER_S = 32 << 20
"""The slowest transfer a deadline allows for: a twentieth of what the stream reaches on a busy 2-core machine."""


@dataclass(frozen=True, slots=True)
class GetOptions:
    """What a GetRequest says beside its keys. device: a GPU, in whose memory hits may lie. rest: it, serialized."""

    leading: bool = False
    accept: tuple[str, ...] = ()
    accept_from_nbytes: int = 0
    lookup: Lookup | None = None
    device: bytes = b""
    rest: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rest", self.request().SerializeToString())

    def request(self, keys: Iterable[bytes] = ()) -> pb.GetRequest:
        """The request for these keys."""
        return pb.GetRequest(
            keys=keys,
            leading=self.leading,
            accept=self.accept,
            accept_from_nbytes=self.accept_from_nbytes,
            lookup=lookup_message(self.lookup),
            device=self.device,
        )

    def asking_for(self, tails: Sequence[bytes]) -> bytes:
        """`rest`, and the tails to look at."""
        return self.rest + pb.GetRequest(tails=tails).SerializeToString() if tails else self.rest

    def continued(self) -> "GetOptions":
        """Those of a later call of the same get."""
        return self if self.lookup is None else replace(self, lookup=self.lookup.continued())


def lookup_message(lookup: Lookup | None) -> pb.Lookup | None:
    """A lookup as a message. Raises InvalidEntry."""
    if lookup is None:
        return None
    check_lookup(lookup)
    return pb.Lookup(
        keys=lookup.keys, tokens=lookup.tokens, key_tokens=lookup.key_tokens, uncounted=not lookup.counted,
        prefetch=lookup.prefetch,
    )  # fmt: skip


def read_lookup(message: pb.GetRequest | pb.MatchRequest) -> Lookup | None:
    """What a request says of its lookup; None: nothing. Raises InvalidEntry."""
    if not message.HasField("lookup"):
        return None
    asked = message.lookup
    return check_lookup(Lookup(asked.keys, asked.tokens, asked.key_tokens, not asked.uncounted, asked.prefetch))


def tensor_specs(specs: Mapping[str, TensorInfo]) -> list[pb.TensorSpec]:
    """Specs as messages, in order."""
    return [
        pb.TensorSpec(name=name, dtype=BY_NAME[spec.dtype].wire, shape=spec.shape)  # type: ignore[arg-type]
        for name, spec in specs.items()
    ]


def read_specs(messages: Iterable[pb.TensorSpec]) -> dict[str, TensorInfo]:
    """Specs by name, unchecked but for what a mapping cannot hold. Raises InvalidEntry."""
    specs: dict[str, TensorInfo] = {}
    for spec in messages:
        dtype = BY_WIRE.get(spec.dtype)
        if dtype is None:
            raise InvalidEntry(f"tensor {spec.name!r:.80}: unknown dtype {spec.dtype}")
        if spec.name in specs:
            raise InvalidEntry(f"tensor {spec.name!r:.80} is given twice")
        specs[spec.name] = TensorInfo(dtype.name, tuple(spec.shape))
    return specs


def read_receipt(message: pb.GetHeader | pb.EntryInfo) -> dict[str, float]:
    """Relative errors by tensor. What is missing, or no error, of a lossy entry counts as never measured: infinity."""
    names, errors = [spec.name for spec in message.tensors], message.relative_errors
    if not message.lossy:
        return dict.fromkeys(names, 0.0)
    if len(errors) != len(names):
        return dict.fromkeys(names, inf)
    return {name: error if error >= 0 else inf for name, error in zip(names, errors, strict=True)}


def fidelity_number(fidelity: str) -> pb.Fidelity:
    """The enum value of "auto" or "exact". Raises InvalidEntry."""
    number = _FIDELITIES.get(fidelity)
    if number is None:
        raise InvalidEntry(f"fidelity is auto or exact, got {fidelity!r:.40}")
    return number


def fidelity_name(number: int) -> Fidelity:
    """The name, "auto" or "exact", of the enum value. Raises InvalidEntry."""
    if number not in (pb.FIDELITY_AUTO, pb.FIDELITY_EXACT):
        raise InvalidEntry(f"unknown fidelity {number}")
    return "exact" if number == pb.FIDELITY_EXACT else "auto"


def priority_number(priority: str) -> pb.Priority:
    """The enum value of "normal" or "low". Raises InvalidEntry."""
    if priority not in PRIORITIES:
        raise InvalidEntry(f"priority must be one of {', '.join(PRIORITIES)}, got {priority!r:.40}")
    return pb.PRIORITY_LOW if priority == "low" else pb.PRIORITY_NORMAL


def priority_name(number: int) -> Priority:
    """The name of the enum value. Raises InvalidEntry."""
    if number not in (pb.PRIORITY_NORMAL, pb.PRIORITY_LOW):
        raise InvalidEntry(f"unknown priority {number}")
    return "low" if number == pb.PRIORITY_LOW else "normal"


def tier_number(name: str | None) -> pb.Tier:
    """The enum value of a tier's name; None is unspecified. Raises InvalidEntry."""
    if name is None:
        return pb.TIER_UNSPECIFIED
    if name not in TIERS:
        raise InvalidEntry(f"tier is one of {', '.join(TIERS)}, got {name!r:.40}")
    return TIERS[name]


def read_places(messages: Iterable[pb.Held]) -> list[Held | None]:
    """Where keys are held; None where one is not."""
    return [Held(_PLACES[held.tier], held.nbytes) if held.tier in _PLACES else None for held in messages]


def held_message(held: Held | None) -> pb.Held:
    """The message of one of `read_places`."""
    return pb.Held(tier=_PLACE_NUMBERS[held.tier], nbytes=held.nbytes) if held else pb.Held()


def entry_info_message(info: EntryInfo) -> pb.EntryInfo:
    """What is known of an entry, as a message."""
    return pb.EntryInfo(
        key=info.key,
        tiers=[TIERS[tier] for tier in info.tiers],
        tensors=tensor_specs(info.tensors),
        encoding=info.encoding,
        lossy=info.lossy,
        fidelity=fidelity_number(info.fidelity),
        pinned=info.pinned,
        value_nbytes=info.value_nbytes,
        tier_nbytes=info.tier_nbytes,
        age_s=info.age_s,
        ttl_left_s=-1.0 if info.ttl_left_s is None else info.ttl_left_s,
        hits=info.hits,
        relative_errors=info.receipt.values() if info.lossy else (),
        tenant=info.tenant,
        namespace=info.namespace,
        forms=[
            pb.Form(encoding=form.encoding, bits=form.bits, kl=-1.0 if form.kl is None else form.kl, basis=form.basis)
            for form in info.forms
        ],
    )


def read_entry_info(message: pb.EntryInfo) -> EntryInfo:
    """The object of `entry_info_message`."""
    return EntryInfo(
        key=message.key,
        tiers=tuple(TIER_NAMES[tier] for tier in message.tiers),
        tier_nbytes=tuple(message.tier_nbytes),
        tensors=read_specs(message.tensors),
        encoding=message.encoding,
        lossy=message.lossy,
        fidelity=fidelity_name(message.fidelity),
        pinned=message.pinned,
        value_nbytes=message.value_nbytes,
        age_s=message.age_s,
        ttl_left_s=None if message.pinned else message.ttl_left_s,
        hits=message.hits,
        receipt=read_receipt(message),
        tenant=message.tenant,
        namespace=message.namespace,
        forms=tuple(
            Form(form.encoding, form.bits, form.kl if form.kl >= 0 else None, form.basis) for form in message.forms
        ),
    )


def read_stats(reply: pb.StatsReply) -> Stats:
    """Counters and gauges; the daemon's own (`uptime_s`) among the values."""
    tiers = {
        TIER_NAMES[tier.tier]: TierStats(
            entries=tier.entries,
            used_nbytes=tier.used_nbytes,
            capacity_nbytes=tier.capacity_nbytes,
            hits=tier.hits,
            puts=tier.puts,
            evictions=tier.evictions,
            demotions=tier.demotions,
            promotions=tier.promotions,
        )
        for tier in reply.tiers
        if tier.tier in TIER_NAMES
    }
    return Stats({**reply.values, "uptime_s": reply.uptime_s}, tiers)


def stats_message(stats: Stats) -> pb.StatsReply:
    """The message of `read_stats`, without what only the daemon knows."""
    tiers = [
        pb.TierStats(tier=TIERS[name], **{field: getattr(tier, field) for field in _TIER_COUNTS})
        for name, tier in stats.tiers.items()
    ]
    return pb.StatsReply(values=stats.values, tiers=tiers)


def explanation_message(of: Explanation) -> pb.Explanation:
    """An Explanation as the proto has it."""
    entry = None if of.entry is None else entry_info_message(of.entry)
    return pb.Explanation(
        key=of.key, state=of.state, tier=of.tier, gone_s=of.gone_s, hits=of.hits, entry=entry, shared=of.shared
    )


def read_explanation(message: pb.Explanation) -> Explanation:
    """An Explanation from the proto."""
    entry = read_entry_info(message.entry) if message.HasField("entry") else None
    return Explanation(message.key, message.state, message.tier, message.gone_s, message.hits, entry, message.shared)


def settings_message(settings: Iterable[Setting]) -> pb.SettingsReply:
    """The message of `read_settings`. What JSON cannot express becomes text."""
    return pb.SettingsReply(
        settings=[
            pb.Setting(name=one.name, value=_json(one.value), origin=one.origin, live=one.live) for one in settings
        ]
    )


def read_settings(reply: pb.SettingsReply) -> list[Setting]:
    """The settings in force."""
    return [Setting(one.name, json.loads(one.value), one.origin, one.live) for one in reply.settings]


def changes_message(changes: Mapping[str, tuple[Any, Any]]) -> pb.ConfigureReply:
    """The message of `read_changes`."""
    return pb.ConfigureReply(
        changes=[pb.SettingChange(name=name, before=_json(a), now=_json(b)) for name, (a, b) in changes.items()]
    )


def read_changes(reply: pb.ConfigureReply) -> dict[str, tuple[Any, Any]]:
    """What changed: by name, the values before and now."""
    return {one.name: (json.loads(one.before), json.loads(one.now)) for one in reply.changes}


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda x: asdict(x) if is_dataclass(x) and not isinstance(x, type) else str(x))
