"""`kvstored serve`: the daemon, in the foreground, until SIGTERM."""

import signal
import sys

import click

from kvstored.cli.exits import errors_as_exit_codes
from kvstored.telemetry.logs import set_up


@click.command()
@click.option("--config", type=click.Path(dir_okay=False), help="A TOML file with [server] and [store] tables.")
@click.option("--data-dir", type=click.Path(file_okay=False), help="The directory of the cold tier.")
@click.option("--address", metavar="ADDRESS", help="unix:PATH or tcp:HOST:PORT; several with commas.")
def serve(config: str | None, data_dir: str | None, address: str | None) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C.

    Settings: the file, then KVSTORED_* in the environment, then these options. docs/operations.md lists them all.
    """
    # Until the daemon takes it for a reload: the default action would end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    set_up()  # for errors before the log settings are read
    with errors_as_exit_codes(address or "the configured address"):
        from kvstored.settings import Source

        source = Source(config, data_dir, address)
        settings, origins = source.read()
        set_up(settings.server.log_format, settings.server.log_level)
        from kvstored.server import serve as run

        sys.exit(run(settings, source, origins))
