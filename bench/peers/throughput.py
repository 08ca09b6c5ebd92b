"""Training throughput beside Hugging Face's Trainer and a bare PyTorch loop: same model, batch and data, one thread.

By turns of a few steps, all systems alive at once (bench/turns.py). Reported: median tokens/s, and the medians of the
ratios within rounds with their 95 % bootstrap intervals, by the clock on the wall and by the processor's.

    python -m bench.peers.throughput            adds an entry to bench/results/throughput.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from bench.turns import Turn, append, race, ratios
from tutelage import modalities
from tutelage.base import load
from tutelage.core.engine import Engine
from tutelage.core.graph import Graph
from tutelage.core.run import run_graph
from tutelage.modalities.text import stdlib

LENGTH, ROWS = 128, 8
MANY = 10**6  # steps: more than anybody is asked for
SIZES: dict[str, dict[str, int]] = {
    "20ms": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.8M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4},
    "5M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8},
}


def config(size: str) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": 2048, "max_position_embeddings": 1024, "tie_word_embeddings": True,
            "num_key_value_heads": SIZES[size]["num_attention_heads"], **SIZES[size]}  # fmt: skip


def write_data(folder: Path, parts: int) -> list[str]:
    """The standard library's code as `parts` JSONL files."""
    texts = [record["text"] for record in stdlib.records("stdlib:code", "train")]
    files = []
    for i in range(parts):
        path = folder / f"{parts}-{i}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[i::parts]), encoding="utf-8")
        files.append(str(path))
    return files


def ours(folder: Path, turn: Callable[[], None], *, size: str, parts: int, methods: Sequence[Any] = ()) -> None:
    """Tutelage, with its metrics and journal on; no checkpoint falls into a turn."""
    step = Engine.step

    def timed(self: Engine, *args: Any) -> dict[str, float]:
        turn()
        return step(self, *args)

    Engine.step = timed  # type: ignore[method-assign]
    data = {f"part{i}": path for i, path in enumerate(write_data(folder, parts))}
    recipe = {"stages": {"one": {
        "start": config(size), "tokenizer": "bytes", "data": data, "length": LENGTH, "batch": f"{ROWS}sample",
        "packing": "concat", "precision": "fp32", "until": f"{MANY}step", "evals": {"every": "none", "run": []},
        "optim": {"use": "optim/adamw", "lr": 1e-3}, "schedule": "schedule/constant", "save": {"every": f"{MANY}step"},
        "methods": list(methods),
    }}}  # fmt: skip
    graph = Graph.resolve(load.load(recipe), name="t", modality=modalities.find("text"), runs=folder / "runs")
    run_graph(graph, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)


def blocks(folder: Path) -> torch.Tensor:
    """The same text as rows of bytes, [N, LENGTH]; N a multiple of ROWS."""
    with open(write_data(folder, 1)[0], encoding="utf-8") as lines:
        text = "".join(json.loads(line)["text"] for line in lines).encode()
    ids = torch.frombuffer(bytearray(text[: len(text) // (ROWS * LENGTH) * ROWS * LENGTH]), dtype=torch.uint8)
    return ids.long().view(-1, LENGTH)


def model_of(size: str) -> Any:
    given = {k: v for k, v in config(size).items() if k != "model_type"}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **given))


def bare(folder: Path, turn: Turn, *, size: str) -> None:
    """A loop with nothing around it."""
    model, rows = model_of(size).train(), blocks(folder).view(-1, ROWS, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(MANY):
        turn()
        batch = rows[step % len(rows)]
        logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def trainer(folder: Path, turn: Turn, *, size: str) -> None:
    """transformers.Trainer, logging every step as we do."""

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn()

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "hf"), max_steps=MANY, per_device_train_batch_size=ROWS, learning_rate=1e-3,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, optim="adamw_torch_fused", dataloader_num_workers=0, logging_strategy="steps",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in blocks(folder)]
    run = transformers.Trainer(model=model_of(size), args=arguments, train_dataset=data, callbacks=[Clock()])
    run.remove_callback(transformers.PrinterCallback)
    run.train()


def measure(size: str, *, lives: int, rounds: int, steps: int) -> dict[str, Any]:
    """All systems by turns; every round's seconds a step, and what they come to."""
    systems: dict[str, Callable[..., None]] = {
        "tutelage": partial(ours, size=size, parts=1),
        "tutelage, 8 sources": partial(ours, size=size, parts=8),
        "bare loop": partial(bare, size=size),
        "trainer": partial(trainer, size=size),
    }
    took = race(systems, lives=lives, rounds=rounds, steps=steps)
    return {
        "tokens_per_second": {name: round(ROWS * LENGTH / median(t["wall"])) for name, t in took.items()},
        "ratio_to": ratios(took, of="tutelage", lives=lives),
        "seconds_a_step": {name: {c: [round(s, 6) for s in t[c]] for c in t} for name, t in took.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lives", type=int, default=6, help="how often all processes begin anew")
    parser.add_argument("--rounds", type=int, default=15, help="of a life")
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.8M", "5M"])
    parser.add_argument("--dry", action="store_true", help="write nothing down")
    given = parser.parse_args()
    load_before = os.getloadavg()[0]
    results = {size: measure(size, lives=given.lives, rounds=given.rounds, steps=given.steps) for size in given.sizes}
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    entry = {"date": str(date.today()), "rounds": given.rounds, "steps": given.steps, "length": LENGTH, "rows": ROWS}
    entry |= {"by": "turns", "lives": given.lives, "load": round(load_before, 2), **about, "results": results}
    if not given.dry:
        append(Path(__file__).parent.parent / "results" / "throughput.json", entry)
    for size, result in results.items():
        for name, clocks in result["ratio_to"].items():
            for clock, r in clocks.items():
                print(f"{size}: {r['median']:.3f} × the speed of {name} ({r['low']:.3f}–{r['high']:.3f}, {clock})")


if __name__ == "__main__":
    main()
