"""The software bill of materials of an environment, as CycloneDX 1.6 JSON on standard output. Standard library only.

It lists what is installed where it runs: name, version, licence, package URL, and who needs whom. A serial number and a
time are left out, so that the same environment gives the same bytes.
"""

import json
import re
import sys
from importlib.metadata import Distribution, distributions


def normal(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def reference(found: Distribution) -> str:
    """The package URL: which index entry this is."""
    return f"pkg:pypi/{normal(found.metadata['Name'])}@{found.version}"


def component(found: Distribution) -> dict[str, object]:
    """One installed package."""
    told = found.metadata
    made: dict[str, object] = {
        "type": "library",
        "bom-ref": reference(found),
        "name": told["Name"],
        "version": found.version,
        "purl": reference(found),
    }
    licence = told.get("License-Expression") or told.get("License")
    if licence and "\n" not in licence:
        made["licenses"] = [{"license": {"name": licence}}]
    return made


def application(found: Distribution | None) -> dict[str, object]:
    """What the bill is of: kvstored, or where it only lies on the path, its name."""
    if found is None:
        return {"type": "application", "name": "kvstored", "bom-ref": "kvstored"}
    return {**component(found), "type": "application"}


def bill() -> dict[str, object]:
    """The whole document."""
    installed = {normal(found.metadata["Name"]): found for found in distributions() if found.metadata["Name"]}
    needs = {}
    for found in installed.values():
        names = (normal(re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0]) for text in found.requires or ())
        needs[reference(found)] = sorted({reference(installed[name]) for name in names if name in installed})
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": application(installed.get("kvstored"))},
        "components": [component(installed[name]) for name in sorted(installed) if name != "kvstored"],
        "dependencies": [{"ref": ref, "dependsOn": needs[ref]} for ref in sorted(needs)],
    }


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")
