"""Which entries a command is about: the filters that ls and evict share, applied to the daemon's listing."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kvstore.config import parse_nbytes
from kvstore.errors import ConfigError
from kvstore.hit import EntryInfo
from kvstored.cli.keytext import KEY
from kvstored.cli.remote import namespaces

if TYPE_CHECKING:
    from kvstored_client import Client


class SizeType(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest click we allow
    """Bytes: 4096, 512MiB, 1.5GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes, or a usage error."""
        try:
            return parse_nbytes(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


SIZE = SizeType()


@dataclass(frozen=True)
class Filters:
    """What an entry must be. Empty: anything."""

    tier: str | None = None
    prefix: bytes = b""
    namespace: str = ""
    tenant: str = ""
    encoding: str | None = None
    older_than_s: float | None = None
    larger_than: int | None = None

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return self != Filters()

    def entries(self, client: "Client", limit: int | None = None) -> Iterator[EntryInfo]:
        """The entries that fit, in order of key."""
        # The daemon knows these four; the rest is decided here, so a limit can only be counted here.
        found = 0
        chosen = client.entries(tier=self.tier, key_prefix=self.prefix, tenant=self.tenant, namespace=self.namespace)
        for info in chosen:
            if limit is not None and found >= limit:
                return
            if self._fits(info):
                found += 1
                yield info

    def _fits(self, info: EntryInfo) -> bool:
        return (
            (self.encoding is None or info.encoding == self.encoding)
            and (self.older_than_s is None or info.age_s > self.older_than_s)
            and (self.larger_than is None or info.value_nbytes > self.larger_than)
        )


def filtered(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options; it gets them as `filters`."""

    @click.option("--tier", type=click.Choice(["hot", "warm", "cold"]), help="Only entries that this tier holds.")
    @click.option("--prefix", type=KEY, default=b"", help="Only keys with this beginning.")
    @click.option(
        "--namespace",
        default="",
        shell_complete=namespaces,
        help="Only entries put under this name, its versions NAME@... included.",
    )
    @click.option("--tenant", default="", help="Only entries of this tenant.")
    @click.option("--encoding", help="Only entries held in this encoding: raw, nf4, ...")
    @click.option("--older-than-s", type=click.FloatRange(min=0), help="Only entries that were put longer ago.")
    @click.option("--larger-than", type=SIZE, metavar="SIZE", help="Only entries of more decoded bytes: 512MiB.")
    @functools.wraps(function)
    def command(
        *arguments: Any,
        tier: str | None,
        prefix: bytes,
        namespace: str,
        tenant: str,
        encoding: str | None,
        older_than_s: float | None,
        larger_than: int | None,
        **others: Any,
    ) -> None:
        function(
            *arguments, filters=Filters(tier, prefix, namespace, tenant, encoding, older_than_s, larger_than), **others
        )

    return command
