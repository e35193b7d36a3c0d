"""Make tests/upgrade/fixtures again, out of this repository's history: needs git, and the packages of `make install`.

    python tests/upgrade/make_fixtures.py

format-1.tar.xz, format-2.tar.xz: cold directories by the last version of each format, beside the digests of what that
version read back. kvstored-*.whl.xz: the last release's client, daemon and engine, without the experiments.
"""

import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from contents import SEAL_KEY

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
LAST_RELEASE = "2743c43"
"""What "the last release" is until there is a tag: the tree before the work on access and limits."""
COMMITS = {1: "f6537b2~1", 2: LAST_RELEASE}
"""By format, the last commit that wrote it."""
_EPOCH = (2026, 11, 28, 0, 0, 0)


def checkout(commit: str, directory: Path) -> None:
    """The tree of a commit."""
    directory.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=HERE.parents[1], check=True, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(directory)], check=True, input=archive.stdout)


def pack(source: Path, target: Path) -> None:
    """The directory as .tar.xz, with no owner of this machine in it."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(target, "w:xz", preset=9) as archive:
        archive.add(source, ".", filter=anonymous)


def write_directory(number: int, tree: Path, top: Path) -> None:
    """fixtures/format-NUMBER.tar.xz."""
    made, seal_key = top / f"format-{number}", top / "seal.key"
    made.mkdir()
    seal_key.write_text(SEAL_KEY)
    seal_key.chmod(0o600)
    path = os.pathsep.join(str(tree / part) for part in (".", "daemon", "client"))
    with (made / "digests.json").open("wb") as digests:
        subprocess.run(
            [sys.executable, str(HERE / "write_directory.py"), str(number), str(made / "cold"), str(seal_key)],
            check=True, stdout=digests, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    (made / "cold/index/lock.mdb").unlink()  # LMDB makes it anew
    pack(made, FIXTURES / f"format-{number}.tar.xz")


def build_wheel(tree: Path, top: Path) -> None:
    """fixtures/kvstored-*.whl.xz: a wheel whose files are only stored, compressed as one: half of the bytes."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(top), str(tree)], check=True)
    built, version = next(top.glob("kvstored-*.whl")), f"0.1.0+{LAST_RELEASE}"
    target, whole = FIXTURES / built.name.replace("0.1.0", version), io.BytesIO()
    with zipfile.ZipFile(built) as old, zipfile.ZipFile(whole, "w") as new:
        for name in sorted(old.namelist()):
            if not name.startswith("experiments/"):
                data = old.read(name).replace(b"\nVersion: 0.1.0\n", f"\nVersion: {version}\n".encode())
                record = name.endswith("/RECORD")  # what it lists has changed, and pip asks only that it is there
                info = zipfile.ZipInfo(name.replace("0.1.0.dist-info", f"{version}.dist-info"), _EPOCH)
                new.writestr(info, b"" if record else data)
    target.with_name(f"{target.name}.xz").write_bytes(lzma.compress(whole.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    """From the command line."""
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        for number, commit in COMMITS.items():
            tree = top / f"tree-{number}"
            checkout(commit, tree)
            write_directory(number, tree, top)
            if commit == LAST_RELEASE:
                build_wheel(tree, top)


if __name__ == "__main__":
    main()
