"""The pages for who begins: their commands exist or run, their snippets run, and a daemon could read their files."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from kvstored.cli import cli
from kvstored.settings import load_settings
from tests.conftest import ROOT, environment, free_port
from tests.side import side, why_missing

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
DEPLOY = ROOT / "daemon/deploy"
IDENTITY = {"model": "tiny", "revision": "1", "dtype": "float32", "layers": 4, "kv_heads": 2, "head_dim": 64}
PROGRAM = f"{shlex.quote(sys.executable)} -m kvstored"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of each `kvstored VERB ...` in a page's shell blocks and at the beginning of its code spans."""
    shells = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]*)`", prose)]
    found = [re.match(r"kvstored ([a-z][^\\]*)$", span) for span in spans]
    found += [re.search(r"(?:^|&& |/bin/)kvstored ([a-z].*)", line.split(" #")[0]) for line in shells]
    return [shlex.split(re.split(r"[|&;>]|\.\.\.", match[1])[0]) for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_command_in_a_page_is_a_verb_with_options_that_exist(page):
    for words in commands(page.read_text()):
        command, rest = cli, words
        while rest and hasattr(command, "commands"):
            assert rest[0] in command.commands, f"kvstored {' '.join(words)}"
            command, rest = command.commands[rest[0]], rest[1:]
        known = {name for option in command.params for name in option.opts} | {"--help", "-h"}
        for word in rest:
            if re.match(r"--?[a-zA-Z]", word):
                assert word.split("=")[0] in known, f"kvstored {' '.join(words)}"


def ran(code: str, address: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(KVSTORED_ADDRESS=address), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def invoked(words: list[str], address: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, words, env={"KVSTORED_ADDRESS": address})
    return done.exit_code, done.output


def test_the_tutorial_stores_a_prefix_and_another_worker_finds_two_also_after_a_restart(daemon):
    first, second = blocks("tutorial.md", "python")
    assert ran(first, daemon.address) == "4 chunks stored\n"
    assert ran(second, daemon.address).startswith("512 ")
    for words in (["stats"], ["ls"], ["top", "--count", "1"], ["drain"]):
        assert words in commands((DOCS / "tutorial.md").read_text())
        assert invoked(words, daemon.address)[0] == 0, words
    assert daemon.stop() == 0
    daemon.start()
    assert ran(second, daemon.address).startswith("512 ")


def test_the_recipe_for_asyncio_runs(daemon):
    (code,) = blocks("faq.md", "python")
    assert ran(code, daemon.address) == "8 hits\n3.0\n"


def shell(text: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", f'kvstored() {{ {PROGRAM} "$@"; }}\n{text}'], cwd=cwd, env=environment(**extra),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: no certificates for TLS tests")
def test_the_five_commands_for_tls_give_a_daemon_that_a_worker_reaches(daemon_factory, tmp_path):
    _, settings = blocks("deployment.md", "toml")
    five, client = blocks("deployment.md", "sh")[:2]
    assert len(five.strip().splitlines()) == 5
    done = shell(five, tmp_path)
    assert done.returncode == 0, done.stderr
    port = free_port()
    told = re.sub(r"^address.*\n", "", settings.partition("[server]\n")[2], flags=re.MULTILINE)
    daemon = daemon_factory(server=told.replace("/etc/kvstored", str(tmp_path)), start=False)
    daemon.config.write_text(daemon.config.read_text().replace('k.sock"', f'k.sock,tls:127.0.0.1:{port}"'))
    daemon.start()
    assert client.count("tls:cache-host:7070") == 1
    client = client.replace("tls:cache-host:7070", f"tls:localhost:{port}")
    done = shell(client, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not held" in done.stdout + done.stderr
    (tmp_path / "worker-a.token").write_text("another")
    assert shell(client, tmp_path).returncode != 1


def test_a_copied_directory_is_served_and_an_export_is_imported_by_the_commands_of_the_page(daemon_factory, tmp_path):
    first = daemon_factory()
    first.client().put(b"kept", {"x": np.ones(3, np.float32)}, fidelity="exact")
    snapshot, backup, export = blocks("deployment.md", "sh")[2:5]
    data = str(first.directory / "data")
    done = shell(snapshot.replace("/var/lib/kvstored", data), tmp_path, KVSTORED_ADDRESS=first.address)
    assert done.returncode == 0, done.stderr
    assert "1 entries" in invoked(["fsck", "--data-dir", f"{data}/snapshot"], "")[1]
    assert "cp -a /var/lib/kvstored /backup/kvstored" in backup
    assert invoked(["drain"], first.address)[0] == 0
    assert first.stop() == 0
    second = daemon_factory(start=False)
    subprocess.run(["cp", "-a", data, str(second.directory / "data")], check=True)
    second.start()
    assert second.client().get(b"kept") is not None
    places = {"/var/lib/kvstored": data, "/backup": str(tmp_path), "/new/kvstored": str(tmp_path / "new")}
    for place, here in places.items():
        export = export.replace(place, here)
    done = shell(export, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_and_the_daemonset_name_settings_paths_and_verbs_that_exist():
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    daemon_set = yaml.safe_load((DEPLOY / "daemonset.yaml").read_text())
    pod = daemon_set["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for environ in (compose["kvstored"]["environment"], {one["name"]: one["value"] for one in container["env"]}):
        image = {"STATE_DIRECTORY": "/var/lib/kvstored", "RUNTIME_DIRECTORY": "/run/kvstored"}
        settings = load_settings(ROOT / "daemon/kvstored.toml", environ=environ | image)
        assert settings.server.metrics_address == "0.0.0.0:9411"
        assert settings.store.ttl_s == 86400
    assert container["args"][:2] == ["kvstored", "serve"]
    assert daemon_set["spec"]["selector"]["matchLabels"] == daemon_set["spec"]["template"]["metadata"]["labels"]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    (snippet,) = blocks("deployment.md", "yaml")
    worker = yaml.safe_load(snippet)["spec"]
    assert worker["volumes"][0]["hostPath"]["path"] == pod["volumes"][0]["hostPath"]["path"]
    assert worker["securityContext"]["supplementalGroups"] == [pod["securityContext"]["runAsGroup"]]
    told = {one["name"]: one["value"] for one in worker["containers"][0]["env"]}
    assert told["KVSTORED_DAEMON_UID"] == str(pod["securityContext"]["runAsUser"])
    for found in (told, compose["worker"]["environment"]):
        assert found["KVSTORED_ADDRESS"] == f"unix:{worker['volumes'][0]['hostPath']['path']}/kvstored.sock"
    assert compose["kvstored"]["build"]["dockerfile"] == "daemon/Containerfile"


def test_the_citation_names_the_project_as_it_is():
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{told["version"]}"' in project
    assert f'license = "{told["license"]}"' in project
    assert f'Repository = "{told["repository-code"]}"' in project


ENGINES = {
    "vllm": (
        "vllm",
        ["Creating v1 connector with name: ", "External prefix cache hit rate:", "vllm:external_prefix_cache_hits"],
    ),
    "sglang": ("sglang", ["Creating dynamic storage backend '", "sglang:prefetched_tokens_total", "#cached-token"]),
    "lmcache": ("lmcache", ["test_l2_adapter"]),
}
"""The wheel of each page's engine, and what the page says that the engine prints or exports."""


@cache
def source_of(wheel: str) -> str:
    """All Python of an engine's wheel, unpacked by `make test`. Skips where it is not."""
    reason = why_missing(wheel)
    if reason:
        pytest.skip(reason)
    return "\n".join(path.read_text(errors="replace") for path in (side() / wheel / wheel).rglob("*.py"))


@pytest.mark.parametrize("page", ENGINES)
def test_an_engines_page_has_a_whole_command_line_whose_options_and_classes_exist(page):
    (block,) = blocks(f"integrations/{page}.md", "sh")
    for text in re.findall(r"'(\{.*?\})'", block, re.DOTALL):
        told = json.loads(text)
        inner = told.get("kv_connector_extra_config") or told.get("adapter_params") or told
        module = told.get("kv_connector_module_path") or told.get("module_path")
        if module:
            name = told.get("class_name") or told["kv_connector"]
            path = ROOT / "client" / Path(*module.split(".")).with_suffix(".py")
            assert re.search(rf"^class {name}\b", path.read_text(), re.MULTILINE), name
            assert inner["address"] in block.split("&")[0], "the address of the daemon in the line before"
    source = source_of(ENGINES[page][0])
    for line in block.replace("\\\n", " ").splitlines():
        if not line.startswith("kvstored"):
            for option in re.findall(r"(?<!\S)--([a-z0-9-]+)", line):
                assert f"--{option}" in source or option.replace("-", "_") in source, option


@pytest.mark.parametrize("page", ENGINES)
def test_what_a_page_says_that_an_engine_prints_is_in_the_engines_source(page):
    text = (DOCS / "integrations" / f"{page}.md").read_text()
    wheel, printed = ENGINES[page]
    source = source_of(wheel)
    for line in printed:
        assert line in text, line
        assert line in source, line
    ours = (ROOT / f"client/kvstored_client/integrations/{page}.py").read_text()
    assert "running without the store: " in text
    assert '"running without the store: %s"' in ours


def test_every_engines_page_says_how_to_see_that_it_works():
    for page in (DOCS / "integrations").glob("*.md"):
        if page.name != "README.md":
            assert "How do I see that it works" in page.read_text(), page.name
            assert "`kvstored stats`" in page.read_text(), page.name


@pytest.mark.slow
def test_the_pages_snippets_pass_the_type_checker(tmp_path):
    """The README's failed it three times: `hit` may be None."""
    snippets = []
    for page in (ROOT / "README.md", DOCS / "tutorial.md", DOCS / "faq.md"):
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            snippets.append(tmp_path / f"{page.stem.lower()}_{number}.py")
            snippets[-1].write_text(code)
    assert len(snippets) == 5
    # The checker's cache of `make type` is used where there is one: torch's types take a minute to read.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *map(str, snippets)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
