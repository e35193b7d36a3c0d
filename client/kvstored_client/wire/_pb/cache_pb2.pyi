from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT64: _ClassVar[DType]
    DTYPE_BOOL: _ClassVar[DType]
    DTYPE_UINT8: _ClassVar[DType]
    DTYPE_INT8: _ClassVar[DType]
    DTYPE_INT16: _ClassVar[DType]
    DTYPE_UINT16: _ClassVar[DType]
    DTYPE_INT32: _ClassVar[DType]
    DTYPE_UINT32: _ClassVar[DType]
    DTYPE_INT64: _ClassVar[DType]
    DTYPE_UINT64: _ClassVar[DType]
    DTYPE_FLOAT8_E4M3FN: _ClassVar[DType]
    DTYPE_FLOAT8_E5M2: _ClassVar[DType]
    DTYPE_FLOAT8_E4M3FNUZ: _ClassVar[DType]
    DTYPE_FLOAT8_E5M2FNUZ: _ClassVar[DType]
    DTYPE_FLOAT8_E8M0FNU: _ClassVar[DType]
    DTYPE_COMPLEX64: _ClassVar[DType]
    DTYPE_COMPLEX128: _ClassVar[DType]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_HOT: _ClassVar[Tier]
    TIER_WARM: _ClassVar[Tier]
    TIER_COLD: _ClassVar[Tier]
    TIER_SHARED: _ClassVar[Tier]

class Fidelity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIDELITY_AUTO: _ClassVar[Fidelity]
    FIDELITY_EXACT: _ClassVar[Fidelity]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT64: DType
DTYPE_BOOL: DType
DTYPE_UINT8: DType
DTYPE_INT8: DType
DTYPE_INT16: DType
DTYPE_UINT16: DType
DTYPE_INT32: DType
DTYPE_UINT32: DType
DTYPE_INT64: DType
DTYPE_UINT64: DType
DTYPE_FLOAT8_E4M3FN: DType
DTYPE_FLOAT8_E5M2: DType
DTYPE_FLOAT8_E4M3FNUZ: DType
DTYPE_FLOAT8_E5M2FNUZ: DType
DTYPE_FLOAT8_E8M0FNU: DType
DTYPE_COMPLEX64: DType
DTYPE_COMPLEX128: DType
TIER_UNSPECIFIED: Tier
TIER_HOT: Tier
TIER_WARM: Tier
TIER_COLD: Tier
TIER_SHARED: Tier
FIDELITY_AUTO: Fidelity
FIDELITY_EXACT: Fidelity
PRIORITY_NORMAL: Priority
PRIORITY_LOW: Priority

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class PutFrame(_message.Message):
    __slots__ = ("header", "chunk", "end")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    header: PutHeader
    chunk: bytes
    end: EntryEnd
    def __init__(self, header: _Optional[_Union[PutHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., end: _Optional[_Union[EntryEnd, _Mapping]] = ...) -> None: ...

class PutHeader(_message.Message):
    __slots__ = ("key", "tensors", "nbytes", "ttl_s", "absolute_ttl", "pin", "fidelity", "parent", "priority", "root", "namespace", "packed")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    ABSOLUTE_TTL_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    nbytes: int
    ttl_s: float
    absolute_ttl: bool
    pin: bool
    fidelity: Fidelity
    parent: bytes
    priority: Priority
    root: bool
    namespace: str
    packed: _containers.RepeatedCompositeFieldContainer[PackedTensor]
    def __init__(self, key: _Optional[bytes] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., nbytes: _Optional[int] = ..., ttl_s: _Optional[float] = ..., absolute_ttl: bool = ..., pin: bool = ..., fidelity: _Optional[_Union[Fidelity, str]] = ..., parent: _Optional[bytes] = ..., priority: _Optional[_Union[Priority, str]] = ..., root: bool = ..., namespace: _Optional[str] = ..., packed: _Optional[_Iterable[_Union[PackedTensor, _Mapping]]] = ...) -> None: ...

class EntryEnd(_message.Message):
    __slots__ = ("xxh3",)
    XXH3_FIELD_NUMBER: _ClassVar[int]
    xxh3: int
    def __init__(self, xxh3: _Optional[int] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("stored", "boot_epoch")
    STORED_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    stored: int
    boot_epoch: int
    def __init__(self, stored: _Optional[int] = ..., boot_epoch: _Optional[int] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("keys", "leading", "accept", "accept_from_nbytes", "lookup", "device", "tails")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LEADING_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FROM_NBYTES_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TAILS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    leading: bool
    accept: _containers.RepeatedScalarFieldContainer[str]
    accept_from_nbytes: int
    lookup: Lookup
    device: bytes
    tails: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., leading: bool = ..., accept: _Optional[_Iterable[str]] = ..., accept_from_nbytes: _Optional[int] = ..., lookup: _Optional[_Union[Lookup, _Mapping]] = ..., device: _Optional[bytes] = ..., tails: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Lookup(_message.Message):
    __slots__ = ("keys", "tokens", "key_tokens", "uncounted", "prefetch")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNCOUNTED_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    keys: int
    tokens: int
    key_tokens: int
    uncounted: bool
    prefetch: bool
    def __init__(self, keys: _Optional[int] = ..., tokens: _Optional[int] = ..., key_tokens: _Optional[int] = ..., uncounted: bool = ..., prefetch: bool = ...) -> None: ...

class GetFrame(_message.Message):
    __slots__ = ("header", "chunk", "end", "miss")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    header: GetHeader
    chunk: bytes
    end: EntryEnd
    miss: GetMiss
    def __init__(self, header: _Optional[_Union[GetHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., end: _Optional[_Union[EntryEnd, _Mapping]] = ..., miss: _Optional[_Union[GetMiss, _Mapping]] = ...) -> None: ...

class GetHeader(_message.Message):
    __slots__ = ("index", "tensors", "nbytes", "tier", "encoding", "lossy", "age_s", "boot_epoch", "put_at", "relative_errors", "packed")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    LOSSY_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PUT_AT_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERRORS_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    index: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    nbytes: int
    tier: Tier
    encoding: str
    lossy: bool
    age_s: float
    boot_epoch: int
    put_at: float
    relative_errors: _containers.RepeatedScalarFieldContainer[float]
    packed: _containers.RepeatedCompositeFieldContainer[PackedTensor]
    def __init__(self, index: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., nbytes: _Optional[int] = ..., tier: _Optional[_Union[Tier, str]] = ..., encoding: _Optional[str] = ..., lossy: bool = ..., age_s: _Optional[float] = ..., boot_epoch: _Optional[int] = ..., put_at: _Optional[float] = ..., relative_errors: _Optional[_Iterable[float]] = ..., packed: _Optional[_Iterable[_Union[PackedTensor, _Mapping]]] = ...) -> None: ...

class PackedTensor(_message.Message):
    __slots__ = ("encoding", "parts", "attrs")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    ATTRS_FIELD_NUMBER: _ClassVar[int]
    encoding: str
    parts: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    attrs: str
    def __init__(self, encoding: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., attrs: _Optional[str] = ...) -> None: ...

class GetMiss(_message.Message):
    __slots__ = ("index", "boot_epoch")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    index: int
    boot_epoch: int
    def __init__(self, index: _Optional[int] = ..., boot_epoch: _Optional[int] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("keys", "every", "lookup")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    every: bool
    lookup: Lookup
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., every: bool = ..., lookup: _Optional[_Union[Lookup, _Mapping]] = ...) -> None: ...

class MatchReply(_message.Message):
    __slots__ = ("held", "boot_epoch")
    HELD_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedCompositeFieldContainer[Held]
    boot_epoch: int
    def __init__(self, held: _Optional[_Iterable[_Union[Held, _Mapping]]] = ..., boot_epoch: _Optional[int] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("tier", "nbytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    nbytes: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., nbytes: _Optional[int] = ...) -> None: ...

class TouchRequest(_message.Message):
    __slots__ = ("keys", "ttl_s")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    ttl_s: float
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class TouchReply(_message.Message):
    __slots__ = ("touched", "boot_epoch")
    TOUCHED_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    touched: int
    boot_epoch: int
    def __init__(self, touched: _Optional[int] = ..., boot_epoch: _Optional[int] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("keys", "keep_shared")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    KEEP_SHARED_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    keep_shared: bool
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., keep_shared: bool = ...) -> None: ...

class DeleteReply(_message.Message):
    __slots__ = ("deleted", "boot_epoch")
    DELETED_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    deleted: int
    boot_epoch: int
    def __init__(self, deleted: _Optional[int] = ..., boot_epoch: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("keys", "pinned", "ttl_s")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    pinned: bool
    ttl_s: float
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., pinned: bool = ..., ttl_s: _Optional[float] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("changed", "boot_epoch")
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    changed: int
    boot_epoch: int
    def __init__(self, changed: _Optional[int] = ..., boot_epoch: _Optional[int] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("prefill_saved_s",)
    PREFILL_SAVED_S_FIELD_NUMBER: _ClassVar[int]
    prefill_saved_s: float
    def __init__(self, prefill_saved_s: _Optional[float] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("boot_epoch",)
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    boot_epoch: int
    def __init__(self, boot_epoch: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("values", "tiers", "uptime_s", "version", "boot_epoch")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, float]
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    uptime_s: float
    version: str
    boot_epoch: int
    def __init__(self, values: _Optional[_Mapping[str, float]] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., uptime_s: _Optional[float] = ..., version: _Optional[str] = ..., boot_epoch: _Optional[int] = ...) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("tier", "entries", "used_nbytes", "capacity_nbytes", "hits", "puts", "evictions", "demotions", "promotions")
    TIER_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    USED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_NBYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    PUTS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    DEMOTIONS_FIELD_NUMBER: _ClassVar[int]
    PROMOTIONS_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    entries: int
    used_nbytes: int
    capacity_nbytes: int
    hits: int
    puts: int
    evictions: int
    demotions: int
    promotions: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., entries: _Optional[int] = ..., used_nbytes: _Optional[int] = ..., capacity_nbytes: _Optional[int] = ..., hits: _Optional[int] = ..., puts: _Optional[int] = ..., evictions: _Optional[int] = ..., demotions: _Optional[int] = ..., promotions: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("tier", "key_prefix", "limit", "tenant", "namespace")
    TIER_FIELD_NUMBER: _ClassVar[int]
    KEY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    key_prefix: bytes
    limit: int
    tenant: str
    namespace: str
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., key_prefix: _Optional[bytes] = ..., limit: _Optional[int] = ..., tenant: _Optional[str] = ..., namespace: _Optional[str] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[EntryInfo]
    def __init__(self, entries: _Optional[_Iterable[_Union[EntryInfo, _Mapping]]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    def __init__(self, key: _Optional[bytes] = ...) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ("entry",)
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    entry: EntryInfo
    def __init__(self, entry: _Optional[_Union[EntryInfo, _Mapping]] = ...) -> None: ...

class EntryInfo(_message.Message):
    __slots__ = ("key", "tiers", "tensors", "encoding", "lossy", "fidelity", "pinned", "value_nbytes", "tier_nbytes", "age_s", "ttl_left_s", "hits", "relative_errors", "tenant", "namespace", "forms")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    LOSSY_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    VALUE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_NBYTES_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    TTL_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERRORS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    FORMS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    tiers: _containers.RepeatedScalarFieldContainer[Tier]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    encoding: str
    lossy: bool
    fidelity: Fidelity
    pinned: bool
    value_nbytes: int
    tier_nbytes: _containers.RepeatedScalarFieldContainer[int]
    age_s: float
    ttl_left_s: float
    hits: int
    relative_errors: _containers.RepeatedScalarFieldContainer[float]
    tenant: str
    namespace: str
    forms: _containers.RepeatedCompositeFieldContainer[Form]
    def __init__(self, key: _Optional[bytes] = ..., tiers: _Optional[_Iterable[_Union[Tier, str]]] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., encoding: _Optional[str] = ..., lossy: bool = ..., fidelity: _Optional[_Union[Fidelity, str]] = ..., pinned: bool = ..., value_nbytes: _Optional[int] = ..., tier_nbytes: _Optional[_Iterable[int]] = ..., age_s: _Optional[float] = ..., ttl_left_s: _Optional[float] = ..., hits: _Optional[int] = ..., relative_errors: _Optional[_Iterable[float]] = ..., tenant: _Optional[str] = ..., namespace: _Optional[str] = ..., forms: _Optional[_Iterable[_Union[Form, _Mapping]]] = ...) -> None: ...

class Form(_message.Message):
    __slots__ = ("encoding", "bits", "kl", "basis")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    KL_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    encoding: str
    bits: float
    kl: float
    basis: str
    def __init__(self, encoding: _Optional[str] = ..., bits: _Optional[float] = ..., kl: _Optional[float] = ..., basis: _Optional[str] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("evicted",)
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    evicted: int
    def __init__(self, evicted: _Optional[int] = ...) -> None: ...

class DemoteRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class MoveReply(_message.Message):
    __slots__ = ("moved",)
    MOVED_FIELD_NUMBER: _ClassVar[int]
    moved: int
    def __init__(self, moved: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("keys", "tenant")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    tenant: str
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., tenant: _Optional[str] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("explanations",)
    EXPLANATIONS_FIELD_NUMBER: _ClassVar[int]
    explanations: _containers.RepeatedCompositeFieldContainer[Explanation]
    def __init__(self, explanations: _Optional[_Iterable[_Union[Explanation, _Mapping]]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("key", "state", "tier", "gone_s", "hits", "entry", "shared")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    GONE_S_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    state: str
    tier: str
    gone_s: float
    hits: int
    entry: EntryInfo
    shared: str
    def __init__(self, key: _Optional[bytes] = ..., state: _Optional[str] = ..., tier: _Optional[str] = ..., gone_s: _Optional[float] = ..., hits: _Optional[int] = ..., entry: _Optional[_Union[EntryInfo, _Mapping]] = ..., shared: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("written",)
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    written: int
    def __init__(self, written: _Optional[int] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("checked", "total", "nbytes", "corrupt")
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    checked: int
    total: int
    nbytes: int
    corrupt: int
    def __init__(self, checked: _Optional[int] = ..., total: _Optional[int] = ..., nbytes: _Optional[int] = ..., corrupt: _Optional[int] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("directory",)
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    directory: str
    def __init__(self, directory: _Optional[str] = ...) -> None: ...

class SnapshotReply(_message.Message):
    __slots__ = ("done", "total", "copied", "nbytes", "lost")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    copied: int
    nbytes: int
    lost: int
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., copied: _Optional[int] = ..., nbytes: _Optional[int] = ..., lost: _Optional[int] = ...) -> None: ...

class SettingsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SettingsReply(_message.Message):
    __slots__ = ("settings",)
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    def __init__(self, settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("name", "value", "origin", "live")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    origin: str
    live: bool
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ..., origin: _Optional[str] = ..., live: bool = ...) -> None: ...

class ConfigureRequest(_message.Message):
    __slots__ = ("settings",)
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.ScalarMap[str, str]
    def __init__(self, settings: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ConfigureReply(_message.Message):
    __slots__ = ("changes",)
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[SettingChange]
    def __init__(self, changes: _Optional[_Iterable[_Union[SettingChange, _Mapping]]] = ...) -> None: ...

class SettingChange(_message.Message):
    __slots__ = ("name", "before", "now")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    name: str
    before: str
    now: str
    def __init__(self, name: _Optional[str] = ..., before: _Optional[str] = ..., now: _Optional[str] = ...) -> None: ...

class CheckSharedRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckSharedReply(_message.Message):
    __slots__ = ("complaints",)
    COMPLAINTS_FIELD_NUMBER: _ClassVar[int]
    complaints: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, complaints: _Optional[_Iterable[str]] = ...) -> None: ...

class FlushSharedRequest(_message.Message):
    __slots__ = ("namespace",)
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    def __init__(self, namespace: _Optional[str] = ...) -> None: ...

class FlushSharedReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaseCall(_message.Message):
    __slots__ = ("release", "get", "put", "match", "touch", "delete", "pin", "ingest_nbytes", "number")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    GET_FIELD_NUMBER: _ClassVar[int]
    PUT_FIELD_NUMBER: _ClassVar[int]
    MATCH_FIELD_NUMBER: _ClassVar[int]
    TOUCH_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    INGEST_NBYTES_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    release: _containers.RepeatedScalarFieldContainer[int]
    get: GetRequest
    put: LeasePut
    match: MatchRequest
    touch: TouchRequest
    delete: DeleteRequest
    pin: PinRequest
    ingest_nbytes: int
    number: int
    def __init__(self, release: _Optional[_Iterable[int]] = ..., get: _Optional[_Union[GetRequest, _Mapping]] = ..., put: _Optional[_Union[LeasePut, _Mapping]] = ..., match: _Optional[_Union[MatchRequest, _Mapping]] = ..., touch: _Optional[_Union[TouchRequest, _Mapping]] = ..., delete: _Optional[_Union[DeleteRequest, _Mapping]] = ..., pin: _Optional[_Union[PinRequest, _Mapping]] = ..., ingest_nbytes: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class LeasePut(_message.Message):
    __slots__ = ("entries", "copy_later")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    COPY_LATER_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[IngestedEntry]
    copy_later: bool
    def __init__(self, entries: _Optional[_Iterable[_Union[IngestedEntry, _Mapping]]] = ..., copy_later: bool = ...) -> None: ...

class IngestedEntry(_message.Message):
    __slots__ = ("header", "places")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    header: PutHeader
    places: _containers.RepeatedCompositeFieldContainer[TensorPlace]
    def __init__(self, header: _Optional[_Union[PutHeader, _Mapping]] = ..., places: _Optional[_Iterable[_Union[TensorPlace, _Mapping]]] = ...) -> None: ...

class TensorPlace(_message.Message):
    __slots__ = ("segment", "start")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    segment: int
    start: int
    def __init__(self, segment: _Optional[int] = ..., start: _Optional[int] = ...) -> None: ...

class LeaseReply(_message.Message):
    __slots__ = ("error", "segments", "lease", "leased", "complete", "now", "put", "match", "touch", "delete", "pin", "boot_epoch", "lease_max_s", "number", "tail")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    PUT_FIELD_NUMBER: _ClassVar[int]
    MATCH_FIELD_NUMBER: _ClassVar[int]
    TOUCH_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_MAX_S_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    error: LeaseError
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    lease: int
    leased: _containers.RepeatedScalarFieldContainer[bytes]
    complete: bool
    now: float
    put: PutReply
    match: MatchReply
    touch: TouchReply
    delete: DeleteReply
    pin: PinReply
    boot_epoch: int
    lease_max_s: float
    number: int
    tail: int
    def __init__(self, error: _Optional[_Union[LeaseError, _Mapping]] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., lease: _Optional[int] = ..., leased: _Optional[_Iterable[bytes]] = ..., complete: bool = ..., now: _Optional[float] = ..., put: _Optional[_Union[PutReply, _Mapping]] = ..., match: _Optional[_Union[MatchReply, _Mapping]] = ..., touch: _Optional[_Union[TouchReply, _Mapping]] = ..., delete: _Optional[_Union[DeleteReply, _Mapping]] = ..., pin: _Optional[_Union[PinReply, _Mapping]] = ..., boot_epoch: _Optional[int] = ..., lease_max_s: _Optional[float] = ..., number: _Optional[int] = ..., tail: _Optional[int] = ...) -> None: ...

class LeaseError(_message.Message):
    __slots__ = ("kind", "message")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("number", "nbytes", "writable", "device")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    number: int
    nbytes: int
    writable: bool
    device: bytes
    def __init__(self, number: _Optional[int] = ..., nbytes: _Optional[int] = ..., writable: bool = ..., device: _Optional[bytes] = ...) -> None: ...

class Leased(_message.Message):
    __slots__ = ("header", "segment", "start", "generation")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    header: GetHeader
    segment: int
    start: int
    generation: int
    def __init__(self, header: _Optional[_Union[GetHeader, _Mapping]] = ..., segment: _Optional[int] = ..., start: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...
