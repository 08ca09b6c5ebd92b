"""Merges by mergekit, run by the interpreter that has it. It imports nothing of ours.

    python bench/peers/merging_peer.py JOBS

JOBS is a JSON list of mergekit's configurations, each with `out`, the folder it fills, and `masks`, null or a safetensors
file of DARE's draws, found by a digest of the task vector that is dropped from. Prints its version and the memory that
each merge added at its peak, in bytes.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mergekit import sparsify
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from probes_of_merging import apart, digest
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=Path)
    jobs = json.loads(parser.parse_args().jobs.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    memory = [apart(lambda job=job: merge(**job)) for job in jobs]
    print(json.dumps({"version": version("mergekit"), "memory": memory}))


def merge(config: dict[str, Any], out: str, masks: str | None) -> None:
    """One merge, with DARE's draws from a file if there is one."""
    if masks:
        held = load_file(masks)

        def drawn(tensor: torch.Tensor, density: float, rescale_norm: Any = None) -> torch.Tensor:
            return sparsify.rescaled_masked_tensor(tensor, held[digest(tensor)].to(tensor.dtype), rescale_norm)

        sparsify.bernoulli = drawn
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    run_merge(MergeConfiguration.model_validate(config), out, options=options)


if __name__ == "__main__":
    main()
