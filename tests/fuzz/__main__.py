"""Fuzz at length, with figures: `make fuzz-requests fuzz-records`, or

    python -m tests.fuzz requests --count 1000000
    python -m tests.fuzz records --count 1000000

Prints how it goes, then JSON. Ends with 1 if anything raised that must not, a value was wrong, or memory grew.
"""

import argparse
import json
import sys
from collections import Counter

from tests.conftest import factory

from . import records, requests

GROWTH_MAX_NBYTES = 32 << 20


def say(text: str) -> None:
    """How far it is, or what came of it."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def fuzz_requests(count: int, seed: int) -> requests.Report:
    """Against a daemon of its own."""
    with factory() as make:
        daemon = make(server='tokens = "{dir}/tokens.toml"\ntoken_on_unix = true', start=False)
        requests.configure(daemon)
        requests.start(daemon)
        report = requests.run(daemon, count, seed, tell=say)
        code = daemon.stop()
        if code != 0:
            report.surprises.append(f"the daemon ended with {code}")
        report.surprises += requests.errors_in(daemon.log)
        if report.surprises:
            sys.stderr.write(daemon.log[-20_000:])
    return report


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("requests", "records"))
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.what == "requests":
        report: requests.Report | records.Report = fuzz_requests(options.count, options.seed)
    else:
        report = records.run(options.count, options.seed, tell=say)
    samples = report.samples
    growth = samples[-1][1] - samples[len(samples) // 4][1]
    told = {name: value for name, value in vars(report).items() if name != "samples"}
    told["rss_mib"] = [nbytes >> 20 for _, nbytes, _ in (samples[0], samples[len(samples) // 2], samples[-1])]
    told["descriptors"] = [found for _, _, found in (samples[0], samples[len(samples) // 2], samples[-1])]
    told["surprises"] = dict(Counter(report.surprises).most_common(20))
    say(json.dumps(told, indent=1))
    if report.surprises or growth > GROWTH_MAX_NBYTES:
        sys.exit(1)


if __name__ == "__main__":
    main()
