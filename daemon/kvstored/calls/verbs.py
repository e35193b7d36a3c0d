"""The small verbs, message in and message out: one code path behind gRPC and the lease socket. They block."""

from kvstore.keys import CheckedKeys
from kvstore.view import StoreView
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.messages import held_message, read_lookup


class Verbs:
    """Match, touch, delete and pin on a store. Raise KvstoreError."""

    def __init__(self, store: StoreView, boot_epoch: int, *, local: bool = False) -> None:
        """local: a match asks no other host."""
        self._store = store
        self._local = local
        self.epoch = boot_epoch

    def match(self, asked: pb.MatchRequest) -> pb.MatchReply:
        """Leading keys held, or each key's place."""
        keys = CheckedKeys(asked.keys)
        lookup = read_lookup(asked)
        if asked.every:
            held = self._store.locate(keys, lookup=lookup)
        else:
            held = list(self._store.match(keys, lookup=lookup, local=self._local).held)
        return pb.MatchReply(held=map(held_message, held), boot_epoch=self.epoch)

    def touch(self, asked: pb.TouchRequest) -> pb.TouchReply:
        """Count as use."""
        touched = self._store.touch(CheckedKeys(asked.keys), ttl_s=asked.ttl_s or None)
        return pb.TouchReply(touched=touched, boot_epoch=self.epoch)

    def delete(self, asked: pb.DeleteRequest) -> pb.DeleteReply:
        """Forget keys."""
        deleted = self._store.delete(CheckedKeys(asked.keys), keep_shared=asked.keep_shared)
        return pb.DeleteReply(deleted=deleted, boot_epoch=self.epoch)

    def pin(self, asked: pb.PinRequest) -> pb.PinReply:
        """Pin or let go."""
        keys = CheckedKeys(asked.keys)
        changed = self._store.pin(keys, ttl_s=asked.ttl_s or None) if asked.pinned else self._store.unpin(keys)
        return pb.PinReply(changed=changed, boot_epoch=self.epoch)
