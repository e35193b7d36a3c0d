"""Fuzz one target with atheris, from and into its corpus: `make fuzz`.

    python tests/fuzz/fuzz.py record --seconds 60

A crash stops it, with the input in a file crash-*: put that into tests/fuzz/corpus/TARGET/, where tests keep trying it.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    """From the command line."""
    import atheris

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["kvstore", "kvstored", "kvstored_client"]):
        from tests.fuzz.targets import TARGETS

    with tempfile.TemporaryDirectory() as found:
        # The first folder takes new inputs, the second is only read: the committed corpus stays small.
        corpus = ROOT / "tests/fuzz/corpus" / options.target
        atheris.Setup(
            [sys.argv[0], f"-max_total_time={options.seconds}", "-max_len=4096", "-print_final_stats=1", "-verbosity=0",
             "-rss_limit_mb=2048", "-timeout=10", found, str(corpus)],
            TARGETS[options.target],
        )  # fmt: skip
        atheris.Fuzz()


if __name__ == "__main__":
    main()
