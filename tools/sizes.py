"""No module of the three packages has more than 500 lines, and no function more than 60: `make lint` runs this.

A longer module is two subjects, and is split by subject; a longer function does two things. Generated code is not
counted.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kvstore", "daemon/kvstored", "client/kvstored_client")
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60


def too_long(root: Path) -> Iterator[str]:
    """What is over a limit, with the limit, in the order of the files."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if "_pb" not in path.relative_to(root).parts:
                yield from _too_long_in(path, str(path.relative_to(root)))


def _too_long_in(path: Path, name: str) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > MODULE_LINES_MAX:
        yield f"{name}: {lines} lines, at most {MODULE_LINES_MAX}; split it by subject"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield f"{name}:{node.lineno} {node.name}: {lines} lines, at most {FUNCTION_LINES_MAX}; split it"


def main(root: Path = ROOT) -> int:
    """Print what is too long; 1 if anything is."""
    found = list(too_long(root))
    print("\n".join(found) or f"no module over {MODULE_LINES_MAX} lines, no function over {FUNCTION_LINES_MAX}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
