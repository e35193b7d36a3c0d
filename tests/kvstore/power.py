"""Power cuts without a power switch: copies of a cold tier's directory as a cut would leave it.

LMDB's pages are synced at each commit, its meta page is not: a cut may lose the last transaction, never more. Here the
newest of the two meta pages is taken back in the copy, unless the transaction was made durable before.
"""

import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

from kvstore.disk.segments import Place
from kvstore.tiers.cold import Cold

PAGE_NBYTES = 4096
META = slice(16, 152)
"""Of a page: LMDB's MDB_meta, behind the page's header."""
TXNID = struct.Struct("<Q")
_TXNID_AT = 144


class PowerCuts:
    """Cuts the power of a copy whenever the tier has freed places. copies: the directories, oldest first."""

    def __init__(self, cold: Cold, path: Path, top: Path) -> None:
        self._path = path
        self._top = top
        self._durable = True
        self.copies: list[Path] = []
        write, sync, free = cold._records._rows.write, cold._records._rows.sync, cold._records._segments.free

        def written(*args: object) -> list[Place]:
            freed = write(*args)  # type: ignore[arg-type]  # passed on as they come
            self._durable = False
            return freed

        def synced() -> None:
            sync()
            self._durable = True

        def given_back(places: Iterable[Place]) -> None:
            places = list(places)
            free(places)
            if places:
                self.copies.append(self.cut(durable=self._durable))

        cold._records._rows.write = written  # type: ignore[method-assign]
        cold._records._rows.sync = synced  # type: ignore[method-assign]
        cold._records._segments.free = given_back  # type: ignore[method-assign]

    def cut(self, *, durable: bool) -> Path:
        """A copy of the directory now, without the last transaction if that was not durable yet."""
        copy = self._top / f"cut{len(list(self._top.iterdir()))}"
        shutil.copytree(self._path, copy)
        if not durable:
            _take_back(copy / "index" / "data.mdb")
        return copy


def _take_back(index: Path) -> None:
    data = bytearray(index.read_bytes())
    pages = [memoryview(data)[at : at + PAGE_NBYTES] for at in (0, PAGE_NBYTES)]
    old, new = sorted(pages, key=lambda page: TXNID.unpack_from(page, _TXNID_AT))
    txnid = TXNID.unpack_from(new, _TXNID_AT)[0]
    new[META] = old[META]
    TXNID.pack_into(new, _TXNID_AT, max(0, txnid - 2))  # each page has every second transaction: it had that one before
    for page in pages:
        page.release()
    index.write_bytes(data)
