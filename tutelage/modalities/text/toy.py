"""A two-layer model and two tiny sources, on which every method is tried in about half a second."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import orjson

WORDS = ("the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran", "far", "home", "with", "red", "hat")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
              "tie_word_embeddings": True},
    "deep": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
    "qwen2": {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
              "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0},
    "t5": {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
           "dropout_rate": 0.0},
}  # fmt: skip
MODELS |= {
    "qwen2-spans": MODELS["qwen2"],
    "t5-spans": {**MODELS["t5"], "tie_word_embeddings": False},
}  # with sentinels for hidden spans, and rows of the input embeddings that move only where they are read
SPANS = {"train": "bpe", "vocab": 256 + 3 + 20, "sentinels": 20}  # of bytes


def write(folder: Path) -> dict[str, str]:
    """Two sources: `a` is word salad, `b` counts. Files by name; the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in texts().items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            path.write_bytes(b"".join(orjson.dumps({"text": line}) + b"\n" for line in lines))
    return {name: str(folder / f"{name}.jsonl") for name in texts()}


@cache
def texts() -> dict[str, list[str]]:
    """The lines of either source."""
    rng = random.Random(0)
    return {
        "a": [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(8, 30))) for _ in range(200)],
        "b": [
            " ".join(str(n + i) for i in range(rng.randrange(4, 16))) for n in (rng.randrange(900) for _ in range(200))
        ],
    }


def recipe(folder: Path, *, model: str = "llama", steps: int = 12) -> dict[str, Any]:
    """Stage `one` learns `a`, stage `two` learns `b`; 8 rows of 32 bytes a step, in micro-batches of 4."""
    files = write(folder)
    common: dict[str, Any] = {
        "length": 32, "batch": "8sample", "precision": "fp32", "until": f"{steps}step",
        "optim": {"use": "optim/adamw", "lr": 1e-2}, "schedule": "schedule/constant",
        "evals": {"every": "none", "run": ["probe/bits_per_byte"], "final": 8, "passages": 8, "budget": "100%"},
        "save": {"every": "4step"}, "engine": {"micro": 4, "device": "cpu"},
    }  # fmt: skip
    one = {
        "start": dict(MODELS[model]),
        "tokenizer": SPANS if model.endswith("-spans") else "bytes",
        "data": {"a": {"path": files["a"], "val": "20%"}},
        **common,
    }
    two = {"start": "one", "data": {"b": {"path": files["b"], "val": "20%"}}, **common}
    return {"stages": {"one": one, "two": two}}
