"""Tests run offline, on one thread; data that is not there skips its tests visibly."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

# set before anything imports torch or transformers, and seen by the processes that tests start
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIRST = ("test_layers.py", "test_import.py")
LONG = (
    "contract",
    "server",
    "faults",
    "recipes",
    "steering",
)  # rooms whose files take longest: begun early, no worker ends with one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The layers first: what breaks them explains what comes after. A file is one worker's, with all that it sets up."""
    items.sort(key=lambda item: (item.path.name not in FIRST, item.path.parent.name not in LONG))


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """Between two stages garbage is collected: with the libraries' 400,000 objects in it, that took longer than a toy stage."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir() -> Callable[[str], Path]:
    """`data_dir("blimp")` is that folder under $TUTELAGE_DATA (../shared/data when unset); skips where it is absent."""
    root = Path(os.environ.get("TUTELAGE_DATA") or ROOT.parent / "shared" / "data")

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"no data '{name}' in {root}; set TUTELAGE_DATA")
        return path

    return find
