"""From `[store.shared]` to an engine. The libraries of the extra are imported here and in what is imported here."""

import ssl
from pathlib import Path

from kvstore.clock import Clock
from kvstore.config import SharedConfig
from kvstore.errors import ConfigError
from kvstore.ownership import check_private
from kvstore.shared import credentials
from kvstore.shared.addresses import S3Url, ValkeyUrl, parse_url
from kvstore.shared.guarded import Guarded
from kvstore.shared.link import Login

EXTRA = "pip install 'kvstored[shared]'"


def open_engine(config: SharedConfig, clock: Clock) -> Guarded:
    """The engine of a url. It connects when it is first used: a store that is down keeps nobody from starting.

    Raises ConfigError for a url, a file or an installation that cannot work.
    """
    url = parse_url(config.url)
    try:
        return _open_s3(url, config, clock) if isinstance(url, S3Url) else _open_valkey(url, config, clock)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("redis", "obstore"):
            raise
        raise ConfigError(f"store.shared.url needs the package {error.name}: {EXTRA}") from None


def _open_valkey(url: ValkeyUrl, config: SharedConfig, clock: Clock) -> Guarded:
    from kvstore.shared.discovery import TlsFiles
    from kvstore.shared.valkey import Valkey

    told: dict[str, str] = {}
    if config.credentials_file:
        told = credentials.read(config.credentials_file, credentials.VALKEY, ("password",))
    if not url.tls:
        for name in ("ca_file", "cert_file", "key_file"):
            if getattr(config, name):
                raise ConfigError(
                    f"store.shared.{name} is set and the url is not valkeys:// or rediss://: no TLS is spoken"
                )
    login = Login(told.get("username", ""), told.get("password", ""), _tls_context(config) if url.tls else None)
    tls = TlsFiles(config.ca_file, config.cert_file, config.key_file)
    engine = Valkey(url.seeds, login, clock, tls=tls, piece_nbytes=config.piece_nbytes)
    return Guarded(engine, clock, state=engine.nodes.breaker, punctual=True)


def _open_s3(url: S3Url, config: SharedConfig, clock: Clock) -> Guarded:
    from kvstore.shared import s3, s3_health

    told: dict[str, str] = {}
    if config.credentials_file:
        told = credentials.read(config.credentials_file, credentials.S3, credentials.S3[:2])
    for name in ("ca_file", "cert_file", "key_file"):
        if getattr(config, name):
            raise ConfigError(
                f"store.shared.{name} is for Valkey and Redis; S3 is trusted by the system's certificates"
            )
    store = s3.connect(url, told)
    return Guarded(
        s3.S3(store, url, complaints=lambda timeout_s: s3_health.complaints(url, told, clock.now, timeout_s)), clock
    )


def _tls_context(config: SharedConfig) -> ssl.SSLContext:
    """Raises ConfigError for files that are missing, readable by others, or no PEM."""
    for name in ("ca_file", "cert_file", "key_file"):
        path = getattr(config, name)
        if path and not Path(path).is_file():
            raise ConfigError(f"store.shared.{name}: there is no file {path}")
    try:
        context = ssl.create_default_context(cafile=config.ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"store.shared.ca_file: {config.ca_file} is no PEM certificate: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.cert_file:
        check_private(config.key_file, "store.shared.key_file", secret=True)
        try:
            context.load_cert_chain(config.cert_file, config.key_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"store.shared.cert_file, key_file: {config.cert_file} and {config.key_file} are no pair: {error}"
            ) from None
    return context
