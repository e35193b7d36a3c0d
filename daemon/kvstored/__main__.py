"""`kvstored` and `python -m kvstored`."""

import sys
import traceback


def main() -> None:
    """Run the command line. Never returns."""
    # Here rather than above: a damaged install is reported with exit code 70 like every other defect.
    try:
        from kvstored.cli import cli

        cli(prog_name="kvstored")
    except Exception:  # noqa: BLE001 - the outermost boundary: 1 means "not held" here, so a defect must not be a 1
        traceback.print_exc()
        sys.exit(70)


if __name__ == "__main__":
    main()
