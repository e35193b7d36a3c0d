"""Every error that the engine raises, by what the caller can do about it.

    KvstoreError
    |-- InvalidEntry         the caller's data is wrong: fix it           INVALID_ARGUMENT
    |   |-- EntryTooLarge    no tier could ever hold it                   RESOURCE_EXHAUSTED
    |   `-- OutMismatch      `out` cannot take the entry: fix it          (client only)
    |-- OverQuota            a budget is spent: wait, or ask for less     RESOURCE_EXHAUSTED
    |-- CodecError           bytes do not decode under this codec         FAILED_PRECONDITION
    |   `-- UnknownEncoding  internal: no codec here has this name        (never leaves the store)
    |-- TierUnavailable      disk or peer is failing: retry later         UNAVAILABLE
    |-- SharedUnavailable    the shared store does not answer: retry      UNAVAILABLE
    |-- PermissionDenied     the caller lacks this right                  PERMISSION_DENIED
    |-- LeaseKept            a tensor outlived its lease: copy it         (client only)
    |-- RecordCorrupt        internal: a caller sees a miss               DATA_LOSS
    |   `-- UnknownSeal      internal: its key is in no key file          (never leaves the store)
    `-- ConfigError          start-up only: fix the configuration         (exit code 2)

A miss is None, never an exception. Every message carries the value and the limit.
"""


class KvstoreError(Exception):
    """Base of all errors of kvstored; `grpc_code` names the status it travels as."""

    grpc_code = "INTERNAL"


class InvalidEntry(KvstoreError):
    """A key, tensor or option that can never be stored as given."""

    grpc_code = "INVALID_ARGUMENT"


class EntryTooLarge(InvalidEntry):
    """An entry over the configured limits, or larger than any tier."""

    grpc_code = "RESOURCE_EXHAUSTED"


class OutMismatch(InvalidEntry):
    """The tensors given as `out` cannot take the entry."""


class OverQuota(KvstoreError):
    """A budget (bytes in flight, pinned bytes, streams) is spent for now."""

    grpc_code = "RESOURCE_EXHAUSTED"


class CodecError(KvstoreError):
    """Encoded parts that do not belong together: wrong lengths, codes, scales or names."""

    grpc_code = "FAILED_PRECONDITION"


class UnknownEncoding(CodecError):
    """Nothing is wrong with the parts: their codec is another version's, or of a package that is not installed here."""


class TierUnavailable(KvstoreError):
    """A tier or the daemon cannot answer now; the value may still be there later."""

    grpc_code = "UNAVAILABLE"


class SharedUnavailable(KvstoreError):
    """The shared store did not answer in time, or refused. A get sees a miss; a flush, or a check, tells its caller."""

    grpc_code = "UNAVAILABLE"

    def __init__(self, reason: str, sentence: str | None = None) -> None:
        """reason: a word for metrics. With one argument it is the sentence, as it comes over the wire."""
        super().__init__(reason if sentence is None else sentence)
        self.reason = "unavailable" if sentence is None else reason


class PermissionDenied(KvstoreError):
    """The identity behind this call may not do this."""

    grpc_code = "PERMISSION_DENIED"


class LeaseKept(KvstoreError):
    """A tensor of a lease is still referred to after its block, or looked at then: copy what is needed inside."""


class RecordCorrupt(KvstoreError):
    """A stored record failed its checksum or its structure; callers of the store see a miss."""

    grpc_code = "DATA_LOSS"


class UnknownSeal(RecordCorrupt):
    """Nothing is wrong with the record: the key it was sealed under is not among those given."""


class ConfigError(KvstoreError):
    """The configuration is wrong; raised at start-up and never later."""

    grpc_code = "FAILED_PRECONDITION"
