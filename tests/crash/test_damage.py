"""Flipped bits, zeroed, random and swapped pages, truncation, in segments and in the index: no wrong bytes.

A damaged index may end the process that opens it (LMDB checks little), so a child opens it first, after an end in order
too. What gets past that may still end the process; then the next start serves.
"""

import faulthandler
import logging
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.crash.history import KEYS, entry_of, key_of, open_cold, say, seeds, version_in
from tests.crash.points import child, ended

PAGE = 4096


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory closed in order, some of its values replaced and deleted."""
    path = tmp_path_factory.mktemp("intact") / "cold"
    cold = open_cold(path)
    for version in range(1, 3 * KEYS):
        cold.put(entry_of(version % KEYS, version, 20_000))
        if version % 7 == 0:
            cold.flush()
    cold.remove(key_of(5))
    cold.close()
    return path


def truth(n: int) -> int | None:
    return None if n == 5 else max(v for v in range(1, 3 * KEYS) if v % KEYS == n)


def damage(file: Path, rng: random.Random) -> str:
    """Do one thing to a file; what it was."""
    data = bytearray(file.read_bytes())
    kind = rng.choice(["bit", "zero", "random", "swap", "truncate"])
    at = rng.randrange(len(data) // PAGE) * PAGE
    other = rng.randrange(len(data) // PAGE) * PAGE
    if kind == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        data[at : at + PAGE] = bytes(PAGE)
    elif kind == "random":
        data[at : at + PAGE] = rng.randbytes(PAGE)
    elif kind == "swap":
        data[at : at + PAGE], data[other : other + PAGE] = data[other : other + PAGE], data[at : at + PAGE]
    else:
        del data[rng.randrange(len(data)) :]
    file.write_bytes(data)
    return kind


def look(path: Path) -> None:
    """Compare everything that is found with the truth."""
    cold = open_cold(path)
    for n in range(KEYS):
        entry = cold.get(key_of(n))
        if entry is not None and version_in(entry, n) != truth(n):
            (path.parent / "LIE").write_text(f"key {n} is {version_in(entry, n)}, not {truth(n)}")
    cold.put(entry_of(0, 999, 1000))
    cold.flush()
    assert version_in(cold.get(key_of(0)), 0) == 999  # type: ignore[arg-type]
    cold.close()


def test_damaged_segments(tmp_path: Path, intact: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    for seed in seeds(60, "damaged segments"):
        rng = random.Random(seed)
        path = tmp_path / "cold"
        shutil.copytree(intact, path)
        kind = damage(rng.choice(sorted((path / "segments").iterdir())), rng)
        look(path)
        assert not (tmp_path / "LIE").exists(), f"seed {seed} {kind}: {(tmp_path / 'LIE').read_text()}"
        shutil.rmtree(path)


def test_damaged_index(tmp_path: Path, intact: Path) -> None:
    ends: dict[str, int] = {}
    for seed in seeds(20, "damaged index"):
        rng = random.Random(seed)
        path = tmp_path / "cold"
        shutil.copytree(intact, path)
        kind = damage(path / "index" / "data.mdb", rng)
        first = ended(child(lambda path=path: quietly(path)))
        assert not (tmp_path / "LIE").exists(), f"seed {seed} {kind}: {(tmp_path / 'LIE').read_text()}"
        second = ended(child(lambda path=path: quietly(path))) if first else 0
        assert not (tmp_path / "LIE").exists(), f"seed {seed} {kind}: {(tmp_path / 'LIE').read_text()}"
        assert second == 0, f"seed {seed} {kind}: does not serve at the second start either: {first} {second}"
        how = "quarantined" if (path / "quarantine").exists() else "served"
        end = f"{kind} {how}{' after a crash' if first else ''}"
        ends[end] = ends.get(end, 0) + 1
        shutil.rmtree(path)
    say(f"damaged index: {dict(sorted(ends.items()))}")


def quietly(path: Path) -> None:
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    faulthandler.disable()
    look(path)
