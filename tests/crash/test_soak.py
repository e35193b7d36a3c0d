"""The soak in short: an honest run is clean, and one with a client that lies, hangs and does not end says all of it."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore.errors import TierUnavailable
from kvstore.hit import Hit
from tests.conftest import ROOT, environment

sys.path.insert(0, str(ROOT / "bench"))

from soaking import values
from soaking.crew import Bounds, Crew
from soaking.ledger import Ledger, now
from soaking.worker import Worker

QUICK = ("--timeout-s", "1", "--slack-s", "2", "--end-s", "2", "--keys", "12")


def soak(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, float], str]:
    """(exit status, values by name, what was told)."""
    done = subprocess.run(
        [sys.executable, "bench/soak.py", "--json", "--keep", str(tmp_path / "run"), *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {row["name"]: row["value"] for row in rows}, done.stderr


@pytest.mark.timeout(600)
def test_a_short_soak_is_clean(tmp_path: Path):
    # A machine that is busy with other tests takes its time to start interpreters: that says nothing here.
    patient = ("--serves-s", "200", "--slack-s", "60", "--end-s", "120")
    code, found, told = soak(tmp_path, "--minutes", "0.12", "--kills", "1", *patient)
    assert code == 0, told
    assert found["wrong"] == found["resurrected"] == found["hung"] == 0
    assert found["stored"] > 0
    assert found["hits"] > 0


@pytest.mark.timeout(600)
def test_a_soak_with_a_lying_client_says_so(tmp_path: Path):
    liar = ("--client", "tests.crash.doctored:Liar")
    code, found, told = soak(tmp_path, "--minutes", "0.2", "--kills", "0", *liar, *QUICK)
    assert code == 1
    assert found["wrong"] > 0, told
    assert found["resurrected"] > 0, told
    assert found["hung"] > 0, told
    assert "words are another's" in told
    assert "were deleted" in told
    assert "beyond its bound" in told
    assert "did not end within" in told
    assert "doctored.py" in (tmp_path / "run" / "worker-0.dump").read_text(), "where it hung"


class Cache:
    """The verbs of a client on a dictionary, which a test may tamper with."""

    def __init__(self) -> None:
        self.held: dict[bytes, Hit] = {}
        self.fails = False

    def put(self, key: bytes, tensors: Any, **_: Any) -> bool:
        self.held[key] = Hit(key, dict(tensors), "hot", "raw", lossy=False, age_s=0.0)
        if self.fails:
            raise TierUnavailable("no answer")
        return True

    def get(self, key: bytes) -> Hit | None:
        return self.held.get(key)

    def delete(self, key: bytes) -> int:
        return int(self.held.pop(key, None) is not None)

    def namespace(self, **_: Any) -> None:
        return None


class Scene:
    """One worker with one key over such a cache, in the first life of a daemon."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger(path / "ledger", 8, make=True)
        self.ledger.header["life"] = 1
        self.cache = Cache()
        place = {
            "number": 0, "tenant": "a", "ordinal": 0, "peers": [(0, 0)], "seed": 1, "incarnation": 0, "plain": 1,
            "timeout_s": 5.0, "began": now(), "found": str(path / "found"),
        }  # fmt: skip
        self.worker = Worker(place, self.cache, self.ledger)
        self.key = self.worker.key(0)

    def found(self) -> list[tuple[str, str]]:
        """(kind, sentence) of what the worker told of values."""
        path = self.path / "found"
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return [(line["what"], line["text"]) for line in lines if line["what"] in ("wrong", "resurrected")]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_what_is_as_it_was_put_is_no_finding(scene: Scene):
    for _ in range(20):
        scene.worker.put()
        scene.worker.get()
        scene.worker.delete()
        scene.worker.get()
    assert scene.found() == []


def test_a_deleted_value_that_is_back_is_resurrected(scene: Scene):
    scene.worker.put()
    kept = scene.cache.held[scene.key]
    scene.worker.delete()
    scene.cache.held[scene.key] = kept
    scene.worker.get()
    ((kind, text),) = scene.found()
    assert kind == "resurrected"
    assert "version 1, all up to 1 were deleted" in text


def test_a_value_older_than_the_one_acknowledged_is_wrong(scene: Scene):
    scene.worker.put()
    kept = scene.cache.held[scene.key]
    scene.worker.put()
    scene.cache.held[scene.key] = kept
    scene.worker.get()
    ((kind, text),) = scene.found()
    assert kind == "wrong"
    assert "version 1, 2 was acknowledged" in text


def test_after_a_put_in_doubt_both_values_may_be_there_and_the_key_is_not_written_in_this_life(scene: Scene):
    scene.worker.put()
    kept = scene.cache.held[scene.key]
    scene.cache.fails = True
    scene.worker.put()
    scene.worker.get()
    scene.cache.held[scene.key] = kept
    scene.worker.get()
    scene.cache.fails = False
    scene.worker.put()
    assert scene.ledger.attempted(0, 0) == 2
    scene.ledger.header["life"] = 2
    scene.worker.put()
    assert scene.ledger.attempted(0, 0) == 3
    assert scene.found() == []
    scene.cache.held[scene.key] = kept
    scene.worker.get()
    assert [kind for kind, _ in scene.found()] == ["wrong"]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (values.exact("b", b"w0-0", 1, 4096), "tenant b"),
        (values.exact("a", b"w0-1", 1, 4096), "w0-1 of tenant a"),
        (values.exact("a", b"w0-0", 9, 4096), "only 1 were put"),
        ({"x": np.zeros(4)}, "does not say what it is"),
    ],
)
def test_a_value_of_another_tenant_key_or_version_is_wrong(scene: Scene, tensors: dict[str, Any], says: str):
    scene.worker.put()
    scene.cache.held[scene.key] = Hit(scene.key, tensors, "hot", "raw", lossy=False, age_s=0.0)
    scene.worker.get()
    ((kind, text),) = scene.found()
    assert kind == "wrong"
    assert says in text


def test_a_single_word_of_another_value_is_found():
    mine, other = (values.exact("a", b"k", version, 1 << 20) for version in (1, 2))
    mine["x"][777] = other["x"][777]
    with pytest.raises(values.Lie, match=r"1 of 131072 words are another's, the first at 777"):
        values.version_of(mine, "a", b"k", loss=False)


def test_a_row_of_another_value_is_found_among_encoded_ones():
    mine, other = (values.lossy("a", b"k", version, 1 << 16) for version in (1, 2))
    k = mine["k"] * 1.05
    assert values.version_of({**mine, "k": k}, "a", b"k", loss=True) == 1
    k[1, 3, 0] = other["k"][1, 3, 0]
    with pytest.raises(values.Lie, match="relative error of"):
        values.version_of({**mine, "k": k}, "a", b"k", loss=True)
    with pytest.raises(values.Lie, match="no loss"):
        values.version_of({**mine, "k": k}, "a", b"k", loss=False)


def test_an_expired_value_is_wrong_in_the_life_it_was_put_in(scene: Scene):
    scene.worker.put_dying()
    n = next(n for n in range(300, 340) if scene.ledger.attempted(0, n))
    scene.ledger.rows["dead_at"][0, n] = now() - 1
    scene.worker.rng.choice = lambda among: (0, 0) if among is scene.worker.peers else n
    scene.worker.get_dying()
    assert [kind for kind, _ in scene.found()] == ["wrong"]
    scene.ledger.header["life"] = 2
    scene.worker.get_dying()
    assert len(scene.found()) == 1


def test_a_call_beyond_its_bound_hangs_unless_its_worker_was_stopped_meanwhile(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger", 8, make=True)

    crew = Crew(SimpleNamespace(directory=tmp_path, uids={"a": 1}), ledger, 1, ["x:y"], Bounds())
    told = threading.Event()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        crew.hands[0].process = process
        row = ledger.workers[0:1]
        row["verb"], row["bound_s"] = b"get", 10.0
        row["began"], row["stopped_s"] = now() - 25, 15.0
        crew.watch()
        assert crew.found.read_text() == ""
        row["stopped_s"] = 0.0
        process.send_signal = lambda _: told.set()
        crew.watch()
        crew.watch()
        process.kill()
    (line,) = map(json.loads, crew.found.read_text().splitlines())
    assert line["what"] == "hung"
    assert told.is_set()
