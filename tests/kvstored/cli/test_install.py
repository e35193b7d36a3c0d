"""The systemd unit: what the installer writes, how exposed it is, what the log lines look like."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvstored.cli import cli
from kvstored.cli.install import render, resources
from kvstored.telemetry.logs import JsonFormatter, TextFormatter, redact

EXPOSURE_MAX = 2.0


def unit_file(directory):
    path = directory / "kvstored.service"
    path.write_text(render(Path("/bin/true"), Path("/etc/kvstored/kvstored.toml")))
    return path


needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian: systemd)"
)


@needs_systemd_analyze
def test_the_unit_is_exposed_less_than_two(tmp_path):
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit_file(tmp_path))],
        capture_output=True,
        text=True,
        check=True,
    )
    level = float(re.search(r"exposure level for kvstored\.service: ([\d.]+)", done.stdout)[1])
    assert level <= EXPOSURE_MAX, done.stdout


@needs_systemd_analyze
def test_the_unit_has_no_mistakes(tmp_path):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit_file(tmp_path))], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if "kvstored.service" in line]
    assert complaints == []


def test_every_setting_of_the_unit_has_its_reason_above_it():
    """A block of settings begins with a comment; the few lines of [Unit] and [Install] that need none aside."""
    plain = ("Description", "Documentation", "WantedBy")
    explained = False
    for line in (resources() / "kvstored.service").read_text().splitlines():
        if not line or line.startswith("["):
            explained = False
        elif line.startswith("#"):
            explained = True
        else:
            assert explained or line.startswith(plain), line


def test_a_dry_run_shows_every_file_and_command_and_writes_nothing(tmp_path):
    done = CliRunner().invoke(cli, ["install-service", "--dry-run", "--program", "/bin/true", "--gpu"])
    assert done.exit_code == 0, done.output
    for path in (
        "/etc/systemd/system/kvstored.service",
        "/usr/lib/sysusers.d/kvstored.conf",
        "/etc/kvstored/kvstored.toml",
        "/etc/systemd/system/kvstored.service.d/gpu.conf",
    ):
        assert path in done.output
        assert not Path(path).exists() or path == "/etc/kvstored/kvstored.toml"
    assert "ExecStart=/bin/true serve --config /etc/kvstored/kvstored.toml" in done.output
    assert "# run systemd-sysusers" in done.output
    assert "# run systemctl daemon-reload" in done.output
    # Bug 8: without a home Triton had no place for what it compiles.
    assert "\nCacheDirectory=kvstored\n" in done.output
    assert "TRITON_CACHE_DIR=/var/cache/kvstored/triton" in done.output


def test_a_root_directory_gets_the_files_and_a_second_time_keeps_the_configuration(tmp_path):
    command = ["install-service", "--root", str(tmp_path), "--program", "/bin/true"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    config = tmp_path / "etc/kvstored/kvstored.toml"
    assert config.exists()
    config.write_text("# mine\n")
    (tmp_path / "etc/systemd/system/kvstored.service").write_text("old")
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert config.read_text() == "# mine\n"
    assert "ExecStart=/bin/true" in (tmp_path / "etc/systemd/system/kvstored.service").read_text()


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("/home/me/venv/bin/kvstored", "not an absolute path to a program"),
        ("true", "not an absolute path"),
        ("{tmp}/kvstored", "out of the service's reach"),
    ],
)
def test_a_program_the_service_could_not_start_is_refused(program, sentence):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as tmp:
        shutil.copy("/bin/true", f"{tmp}/kvstored")
        done = CliRunner().invoke(
            cli, ["install-service", "--dry-run", "--program", program.replace("{tmp}", tmp)], catch_exceptions=False
        )
    assert done.exit_code == 2
    assert sentence in done.output


def test_the_example_configuration_is_valid():
    from kvstored.settings import load_settings

    settings = load_settings(resources().parent / "kvstored.toml", environ={})
    assert settings.server.metrics_address == "127.0.0.1:9411"


def test_a_json_line_has_the_events_pairs_and_the_priority():
    record = logging.LogRecord("kvstored.x", logging.WARNING, "", 0, "event key=%s n=%d", ("abc", 3), None)
    text = JsonFormatter(priority=True).format(record)
    assert text.startswith("<4>{")
    line = json.loads(text[3:])
    assert line["fields"] == {"key": "abc", "n": "3"}
    assert line["level"] == "warning"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_a_token_never_passes_into_a_line_not_even_in_a_traceback():
    token = "kvd_" + "a" * 43
    try:
        raise ValueError(f"what was sent: Bearer {token}")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed with %s", (token,), sys.exc_info())
    for formatter in (TextFormatter(), JsonFormatter()):
        assert token not in formatter.format(record)
    assert redact(f"authorization: Bearer {token}") == "authorization: [redacted]"


def test_a_package_is_built_where_the_program_is_not_installed_yet(tmp_path):
    words = ["install-service", "--root", str(tmp_path), "--program", "/opt/not-here/bin/kvstored"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    (unit,) = tmp_path.rglob("kvstored.service")
    assert "ExecStart=/opt/not-here/bin/kvstored serve" in unit.read_text()
