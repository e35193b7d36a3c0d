"""`kvstored install-service`: unit, user, configuration; and nothing that `--dry-run` does not print first."""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from kvstored.cli.exits import BadUsage

_PROTECTED = ("/home/", "/root/", "/tmp/", "/var/tmp/", "/run/user/")  # noqa: S108 - named to be refused
"""What ProtectHome and PrivateTmp hide from the service."""


@dataclass(frozen=True)
class _File:
    path: Path
    text: str
    mode: int
    keep: bool = False
    """An operator's own: never overwritten."""


def resources() -> Path:
    """Where the unit files are: inside an installed package, else in the source tree."""
    packaged = Path(__file__).parents[1] / "_systemd"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "systemd"


def render(program: Path, config: Path) -> str:
    """The unit, starting this program with this configuration."""
    text = (resources() / "kvstored.service").read_text()
    return text.replace("@EXECSTART@", f"{_quoted(program)} serve --config {_quoted(config)}")


def _quoted(path: Path) -> str:
    # systemd expands % and, in ExecStart, $.
    text = str(path).replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if shlex.quote(text) != text else text


@click.command("install-service")
@click.option("--dry-run", is_flag=True, help="Print every file and command, change nothing.")
@click.option("--root", "root", type=click.Path(file_okay=False, path_type=Path), default=Path("/"),
              help="Write below this directory and run nothing: for building a package.")  # fmt: skip
@click.option("--program", type=click.Path(path_type=Path), help="The kvstored to start.  [default: this one]")
@click.option("--gpu", is_flag=True, help="Also gpu.conf, which lets the service reach NVIDIA devices.")
@click.option("--start", is_flag=True, help="Enable it and start it now.")
def install_service(*, dry_run: bool, root: Path, program: Path | None, gpu: bool, start: bool) -> None:
    """Install kvstored as a systemd service. Needs root, unless --dry-run or --root is given.

    Writes the unit, a sysusers file and, where there is none, /etc/kvstored/kvstored.toml; then runs systemd-sysusers
    and systemctl daemon-reload. Doing it again upgrades the unit and keeps the configuration.
    """
    live = root == Path("/")
    if live and not dry_run and os.geteuid() != 0:
        raise BadUsage("install-service writes to /etc: run it with sudo, or look first with --dry-run")
    files = _files(root, program or _this_program(), gpu=gpu)
    commands = [["systemd-sysusers"], ["systemctl", "daemon-reload"]]
    if start:
        commands.append(["systemctl", "enable", "--now", "kvstored.service"])
    for file in files:
        kept = file.keep and file.path.exists()
        if dry_run:
            click.echo(f"# {'keep' if kept else 'write'} {file.path} (mode {file.mode:04o})")
            click.echo("" if kept else file.text)
        elif not kept:
            _write(file)
            click.echo(f"wrote {file.path}")
    for command in commands if live else []:
        click.echo(f"# run {shlex.join(command)}" if dry_run else f"running {shlex.join(command)}")
        if not dry_run:
            _run(command)
    if not dry_run and live and not start:
        click.echo("next: systemctl enable --now kvstored, then: kvstored doctor")


def _files(root: Path, program: Path, *, gpu: bool) -> list[_File]:
    # A package is built where the program is not installed yet.
    if not program.is_absolute() or (root == Path("/") and not os.access(program, os.X_OK)):
        raise BadUsage(f"{program} is not an absolute path to a program; name one with --program")
    if str(program).startswith(_PROTECTED):
        raise BadUsage(
            f"{program} is out of the service's reach: it sees no home directories and no shared /tmp. "
            "Install kvstored elsewhere (python3 -m venv /opt/kvstored) and run that one's install-service"
        )
    units = root / "etc/systemd/system"
    config = root / "etc/kvstored/kvstored.toml"
    found = resources()
    example = found / "kvstored.toml" if (found / "kvstored.toml").exists() else found.parent / "kvstored.toml"
    files = [
        _File(units / "kvstored.service", render(program, Path("/etc/kvstored/kvstored.toml")), 0o644),
        _File(root / "usr/lib/sysusers.d/kvstored.conf", (found / "kvstored.sysusers").read_text(), 0o644),
        # World-readable: it holds no secret (tokens are in a file of their own) and `config check` needs no root.
        _File(config, example.read_text(), 0o644, keep=True),
    ]
    if gpu:
        files.append(_File(units / "kvstored.service.d/gpu.conf", (found / "gpu.conf").read_text(), 0o644))
    return files


def _this_program() -> Path:
    beside = Path(sys.executable).with_name("kvstored")
    found = str(beside) if beside.exists() else shutil.which("kvstored")
    if found is None:
        raise BadUsage("no kvstored program beside this Python; name one with --program")
    return Path(found)


def _write(file: _File) -> None:
    file.path.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.path.with_name(f".{file.path.name}.new")
    scratch.write_text(file.text)
    scratch.chmod(file.mode)
    scratch.replace(file.path)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)  # noqa: S603 - two fixed commands
    except FileNotFoundError:
        raise BadUsage(f"{command[0]} not found: this machine does not run systemd") from None
    except subprocess.CalledProcessError as error:
        raise BadUsage(f"{shlex.join(command)} failed with exit status {error.returncode}") from None


COMMANDS = (install_service,)
