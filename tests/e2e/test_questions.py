"""docs/questions.md: each question of an operator at three in the morning is answered by its one command.

The daemon is filled so that each answer is known: one tenant floods, a model holds the memory, a chunk is pinned, what
was put has left for room, the daemon was killed.
"""

import json
import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kvstored.cli import cli
from kvstored_client import Client
from tests.conftest import ROOT
from tests.kvstored.conftest import running_daemon

PAGE = ROOT / "docs/questions.md"
COUNT = 10
SIZES = """
pin_max_fraction = 0.9
[store.hot]
capacity_nbytes = "8MiB"
[store.warm]
capacity_nbytes = "1MiB"
[store.cold]
capacity_nbytes = "1MiB"
"""
IDENTITY = {"revision": "1", "dtype": "float32", "layers": 4, "kv_heads": 2, "head_dim": 64, "layout": "lthd"}


def prompt(number: int, tokens: int = 512) -> list[int]:
    return [1000 * number + i for i in range(tokens)]


def put(client: Client, model: str, number: int, **options) -> list[int]:
    rng, ids = np.random.default_rng(number), prompt(number)
    k = rng.standard_normal((4, len(ids), 2, 64), dtype=np.float32)
    client.namespace(model=model, **IDENTITY).put_prefix(ids, k, k, **options)
    return ids


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A daemon as above, and the files that the commands name."""
    files = tmp_path_factory.mktemp("files")
    patch = pytest.MonkeyPatch()
    tokens = "".join(CliRunner().invoke(cli, ["token", name, "--tenant", name, "--output", str(files / name)]).stdout
                     for name in ("team-a", "team-b"))  # fmt: skip
    (files / "tokens.toml").write_text(tokens)
    (files / "tokens.toml").chmod(0o600)
    with running_daemon(f'tokens = "{files}/tokens.toml"', SIZES) as daemon:
        daemon.start()
        own = daemon.client(framework="numpy")
        ids = put(own, "llama", 1, pin=True)
        own.drain()
        daemon.signal(signal.SIGKILL)
        daemon.process.wait(60)
        daemon.start()
        own = daemon.client(framework="numpy")
        for name, count in (("team-a", 1), ("team-b", 4)):
            patch.setenv("KVSTORED_TOKEN_FILE", str(files / name))
            worker = daemon.client(framework="numpy", shared_memory=False)
            for i in range(count):
                put(worker, "qwen", 10 + i)
        patch.delenv("KVSTORED_TOKEN_FILE")
        space = own.namespace(model="llama", **IDENTITY)
        for i in range(20, 32):
            put(own, "llama", i)
        for i in range(20, 32):
            space.get_prefix(prompt(i))
        (files / "prompt.json").write_text(json.dumps(ids))
        (files / "identity.json").write_text(json.dumps({"model": "llama", **IDENTITY, "dtype": "bfloat16"}))
        large = files / "kvstored.toml"
        large.write_text(f'[server]\ndata_dir = "{daemon.directory}/data"\n[store.cold]\ncapacity_nbytes = "900TiB"\n')
        yield {
            "/etc/kvstored/kvstored.toml": str(large),
            "KEY": f"hex:{space.keys(ids)[0].hex()}",
            "prompt.json": str(files / "prompt.json"), "identity.json": str(files / "identity.json"),
            "trace.jsonl": str(ROOT / "tests/data/mooncake_conversation.jsonl.xz"), "address": daemon.address,
        }  # fmt: skip
    patch.undo()


ANSWERS = {
    1: r"BAD .*GiB free or ours, store\.cold\.capacity_nbytes is \d+\.\d TiB",
    2: r"lookup_misses_evicted +[1-9]",
    3: r"SLOWEST CALLS +MEAN +99 % WITHIN\n(Lease|Cache|Admin)/\S+ +[\d.]+ m?s",
    4: r"^TENANT .*SHARE.*\n(.*\n)*team-b +\d+ .*%.*\nteam-a ",
    5: r"cold_clean_start +0\n(.*\n)*cold_start_entries +2\n",
    6: r"^NAMESPACE .*SHARE.*\n\w+@\w+ +\d+ +[\d.]+ MiB +[1-9]\d\.\d%",
    7: r"PINNED BY.*\n.* llama@\w+ ",
    8: r"^\d+ records, .*: none damaged$",
    9: r"(0-256 .*never put.*\n256-512 .*never put)",
    10: r"^64GiB more RAM: \d+\.\d\d% hit, \+\d+\.\d\d points$",
}
"""By question, what its answer must say of the daemon above."""


def questions() -> list[tuple[str, str, str]]:
    """(question, command, answer) of the page."""
    one = r"^## \d+\. ([^\n]+\?)\n\n```sh\nkvstored ([^\n]+)\n```\n\n```text\n(.*?)\n```$"
    return re.findall(one, PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_has_ten_questions_with_one_command_each():
    assert len(questions()) == COUNT == len(ANSWERS)
    assert len(re.findall(r"^## ", PAGE.read_text(), re.MULTILINE)) == COUNT


@pytest.mark.parametrize("number", ANSWERS)
def test_a_questions_command_gives_the_answer_on_a_daemon_that_has_the_trouble(filled, number):
    """KVSTORED_ANSWERS names a folder for the answers, for whoever writes the page."""
    question, command, shown = questions()[number - 1]
    words = [filled.get(word, word) for word in shlex.split(command)]
    done = CliRunner().invoke(cli, words, env={"KVSTORED_ADDRESS": filled["address"]})
    if "KVSTORED_ANSWERS" in os.environ:
        (Path(os.environ["KVSTORED_ANSWERS"]) / str(number)).write_text(done.output)
    assert re.search(ANSWERS[number], done.stdout, re.MULTILINE), f"{question}\n{done.output}"
    # What the page shows has the decisive place, too.
    assert re.search(ANSWERS[number], shown, re.MULTILINE), shown
