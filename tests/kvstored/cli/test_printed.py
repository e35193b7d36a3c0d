"""What others chose (names, keys, a daemon's words, files) on the operator's terminal and in the log."""

import json
import logging
import os
import stat
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kvstore.entries.safetensors_header import Slot, write_header
from kvstore.errors import InvalidEntry, KvstoreError, TierUnavailable
from kvstore.hit import EntryInfo, Explanation, Hit, TensorInfo
from kvstore.printable import printable
from kvstore.stats import Stats, TierStats
from kvstored.cli import cli, remote
from kvstored.cli.tensorfile import read_tensors
from kvstored.telemetry.logs import JsonFormatter, TextFormatter

EVIL = "a\x1b[31mred\r\n\u202egnp.exe\x9b2J\ud800\0\u2028"


def info() -> EntryInfo:
    return EntryInfo(
        b"\x1b[2J", ("hot", EVIL), (1, 2), {EVIL: TensorInfo(EVIL, (1,))}, EVIL, True, "auto", False, 3, nan, inf, 1,
        {EVIL: nan}, EVIL, EVIL,
    )  # fmt: skip


class Liar:
    """A daemon that answers what it likes."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def inspect(self, _key):
        return info()

    def entries(self, **_):
        return iter([info()])

    def explain(self, *keys, **_):
        return [Explanation(key, EVIL, EVIL, inf, 0, info()) for key in keys]

    def get(self, _key):
        return Hit(b"k", {"x": np.ones(3, np.float32)}, EVIL, EVIL, True, nan, {"x": nan})

    def stats(self):
        names = ("gets", f"misses_{EVIL}", f"namespace_hits_{EVIL}", f"tenant_hits_{EVIL}", f"call_mean_s_{EVIL}")
        return Stats(dict.fromkeys(names, 3.0) | {EVIL: nan, "x_s": inf}, {EVIL: TierStats(1, 1, 2)})

    def touch(self, *_):
        raise KvstoreError(EVIL)

    def pin(self, *_):
        raise KvstoreError(EVIL)

    def unpin(self, *_):
        raise TierUnavailable(EVIL)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(remote, "_client", lambda *_: Liar())
    return lambda *words: CliRunner().invoke(cli, [str(word) for word in words])


VERBS = (["inspect", "k"], ["ls"], ["explain", "k"], ["stats"], ["top", "--count", "1"], ["pin", "k"], ["unpin", "k"])


def lines_of(text: str) -> list[str]:
    return text.split("\n")


@pytest.mark.parametrize("words", VERBS, ids=lambda words: words[0])
def test_nothing_a_daemon_says_reaches_the_terminal_as_it_is(run, words):
    """No colour, no cleared screen, no line that looks like ours, no text turned round."""
    result = run(*words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "a\\x1b[31mred" in result.output
    assert all(line.isprintable() for line in lines_of(result.output))


@pytest.mark.parametrize("words", [*VERBS[:5], ["get", "k"]], ids=lambda words: words[0])
def test_json_is_json_whatever_a_daemon_says(run, words, tmp_path):
    """NaN and infinity, which JSON has no numbers for, were printed as they are."""

    def refuse(constant):
        raise AssertionError(constant)

    more = ["-o", tmp_path / "o.safetensors"] if words[0] == "get" else []
    result = run(*words, *more, "--json")
    assert result.exit_code == 0, result.output
    for line in filter(None, result.stdout.split("\n")):
        assert line.isascii() and line.isprintable()
        json.loads(line, parse_constant=refuse)


def test_a_log_line_is_one_line_whatever_it_names():
    """A newline in a name began a line of its own, which said whatever its author wanted."""
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        failure = (type(error), error, error.__traceback__)
    for formatter in (TextFormatter(), JsonFormatter()):
        record = logging.LogRecord("kvstored", logging.INFO, "f.py", 1, "event key=%s", (EVIL,), None)
        assert formatter.format(record).isprintable()
        record = logging.LogRecord("kvstored", logging.ERROR, "f.py", 1, "failed %s", (EVIL,), failure)
        text = formatter.format(record)
        assert "Traceback" in text
        assert all(line.isprintable() for line in lines_of(text))
        assert "failed a\\" in text


def test_what_is_printable_stays_as_it_is():
    for text in ("plain", "Schlüssel", "鍵 k", "", "a\\x1b"):
        assert printable(text) == text
    assert printable("\x1b\u202e\ud800\n") == "\\x1b\\u202e\\ud800\\n"


def file_of(path: Path, slots: dict[str, Slot], nbytes: int, facts: dict[str, str] | None = None) -> Path:
    path.write_bytes(write_header(slots, facts or {}) + bytes(range(256)) * (nbytes // 256) + bytes(nbytes % 256))
    return path


@pytest.mark.parametrize(
    ("code", "dtype", "itemsize"),
    [("F8_E8M0", "float8_e8m0fnu", 1), ("F8_E4M3FNUZ", "float8_e4m3fnuz", 1), ("F8_E5M2FNUZ", "float8_e5m2fnuz", 1),
     ("C64", "complex64", 8), ("F8_E4M3", "float8_e4m3fn", 1), ("U64", "uint64", 8)],
)  # fmt: skip
def test_put_takes_every_type_of_safetensors_that_the_store_holds(tmp_path, code, dtype, itemsize):
    """F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ and C64 were refused as unknown."""
    path = tmp_path / "f.safetensors"
    text = json.dumps({"x": {"dtype": code, "shape": [4], "data_offsets": [0, 4 * itemsize]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(4 * itemsize)))
    found = read_tensors(path)["x"]
    assert (str(found.dtype), found.shape, found.tobytes()) == (dtype, (4,), bytes(range(4 * itemsize)))


HOSTILE = {
    "name twice": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
    b'"data_offsets":[1,2]}}',
    "overlap": b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[1],'
    b'"data_offsets":[1,2]}}',
    "hole": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
    "negative": b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-2,0]}}',
    "backwards": b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,0]}}',
    "unknown type": b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}',
    "shape over 2**63": b'{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,2]}}',
    "shape of a float": b'{"a":{"dtype":"U8","shape":[2.0],"data_offsets":[0,2]}}',
    "control in a name": b'{"a\\u001b[2J":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "no name": b'{"":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "a path for a name": b'{"%s":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}' % (b"../" * 30),
    "nested": b'{"a":' * 30_000,
    "no tensors": b"{}",
    "not an object": b"[1]",
    "wrong fact": b'{"__metadata__":{"kvstored.dtype.a":"complex64"},'
    b'"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "odd fact": b'{"__metadata__":{"kvstored.dtype.a":7},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_with_its_name_in_one_line(run, tmp_path, kind):
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(HOSTILE[kind]).to_bytes(8, "little") + HOSTILE[kind] + b"\1\2")
    result = run("put", "k", path)
    assert result.exit_code in (2, 4), result.output
    assert result.stderr.endswith("\n") and result.stderr[:-1].isprintable()


@pytest.mark.parametrize("size", [0, 7, 8, 9, 1 << 20])
def test_a_cut_file_is_refused(tmp_path, size):
    path = tmp_path / "f.safetensors"
    whole = file_of(path, {"a": Slot("F32", (1 << 19,), 0, 1 << 21)}, 1 << 21).read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(InvalidEntry):
        read_tensors(path)


def test_what_is_no_regular_file_is_refused_without_waiting(run, tmp_path):
    """A pipe that nobody writes to was waited for without end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        result = run("put", "k", path)
        assert result.exit_code == 2
        assert "not a regular file" in result.stderr
    assert run("put", "k", tmp_path).exit_code == 2
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/\xff\x1b[2J"))
    odd.write_bytes(b"none")
    result = run("put", "k", odd)
    assert result.exit_code == 2
    assert result.stderr[:-1].isprintable()
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_the_status_page_is_json_that_a_browser_reads() -> None:
    """NaN is no JSON: `JSON.parse` refuses the whole page for it."""
    from kvstored.telemetry.metrics_port import json_bytes

    told = json_bytes({"a": float("nan"), "b": [float("inf"), 1.5, {"c": (float("-inf"), "x")}]})
    assert told == b'{"a": null, "b": [null, 1.5, {"c": [null, "x"]}]}'
