"""The adapters' tests over the newest version of each engine, for a maintainer at a release: what ran, as a table.

    python tools/engines/matrix.py [ENGINE ...] [--pre]

For each engine: the newest version that pip finds (with --pre also a candidate), its wheel without dependencies in a
folder of its own, and `tests/e2e/adapters` over it, as `make test` does over the pinned one. Nothing is installed into
the environment, and the pinned wheels stay. A wheel that cannot be had, or an adapter that fails, is a row too; exit
code 1 if one failed. About 3 GB in $XDG_CACHE_HOME/kvstored/engines/matrix, some minutes an engine. The table belongs
in docs/integrations/README.md. Of vLLM these are the classes of its wheel for GPUs; the engine runs by `make engines`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "daemon"), str(ROOT / "client")]
from tests.side import adapters_tried, side, why_missing  # noqa: E402 - found by the line above

ENGINES = {
    "transformers": ("transformers", ["shared"]), "vllm": ("vllm", ["shared"]),
    "lmcache": ("lmcache", ["shared"]), "sglang": ("sglang", ["shared"]),
}  # fmt: skip
"""Each adapter's distribution, and the folders of wheels that it needs beside it."""
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def newest(name: str, *, pre: bool) -> str:
    """The newest version of a distribution that pip finds here. Raises LookupError."""
    asked = [*PIP, "index", "versions", name, *(["--pre"] if pre else [])]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    found = re.match(rf"{re.escape(name)} \(([^)]+)\)", done.stdout)
    if found is None:
        raise LookupError(f"pip finds no {name}: {(done.stderr.strip().splitlines() or ['no answer'])[-1]:.120}")
    return found[1]


def fetched(name: str, version: str) -> Path:
    """The folder of a wheel without its dependencies. Raises LookupError."""
    folder = side().parent / "matrix" / f"{name}-{version}"
    if not (folder / ".whole").exists():
        asked = [*PIP, "install", "--quiet", "--no-deps", "--no-compile", "--only-binary", ":all:", "--upgrade"]
        done = subprocess.run(
            [*asked, "--target", str(folder), f"{name}=={version}"],
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if done.returncode:
            raise LookupError(f"no wheel of {name} {version}: {done.stderr.strip().splitlines()[-1]:.120}")
        (folder / ".whole").touch()
    return folder


def tried(engine: str, folders: list[Path], address: str) -> str:
    """What the adapter's tests say over these wheels: pytest's last line."""
    done = adapters_tried(engine, folders, address)
    last = (done.stdout.strip().splitlines() or ["no answer"])[-1]
    return last if not done.returncode else f"FAILED: {last}"


def row(engine: str, address: str, *, pre: bool) -> tuple[str, str]:
    """(version, what came of it)."""
    name, beside = ENGINES[engine]
    version = "?"
    try:
        version = newest(name, pre=pre)
        for folder in beside:
            if missing := why_missing(folder):
                raise LookupError(missing)
        return f"{name} {version}", tried(
            engine, [fetched(name, version), *(side() / each for each in beside)], address
        )
    except (LookupError, subprocess.TimeoutExpired) as error:
        return f"{name} {version}", f"not run: {error}"


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", nargs="*", choices=[*ENGINES, []], help="by default all")
    parser.add_argument("--pre", action="store_true", help="candidates, too")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="kvm-") as top:
        address = f"unix:{top}/k.sock"
        daemon = subprocess.Popen(
            [sys.executable, "-m", "kvstored", "serve", "--address", address, "--data-dir", f"{top}/data"],
            stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:3])},
        )  # fmt: skip
        try:
            while not Path(top, "k.sock").exists():
                if daemon.poll() is not None:
                    raise SystemExit("the daemon did not start")
                time.sleep(0.05)
            print("| engine | version | what ran |\n|---|---|---|")
            for engine in options.engine or ENGINES:
                version, came = row(engine, address, pre=options.pre)
                failed = failed or came.startswith("FAILED")
                print(f"| {engine} | {version} | {came.strip('= ')} |", flush=True)
        finally:
            daemon.terminate()
            daemon.wait()
    sys.exit(failed)


if __name__ == "__main__":
    main()
