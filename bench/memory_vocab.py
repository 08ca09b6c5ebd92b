"""How much memory a step takes above weights, gradients and optimizer states, with a vocabulary of 151,936.

A model of Qwen2's shape (hidden 896, 2 layers, tied embeddings), AdamW, 8 micro-batches of 1 × 2048 tokens, one thread:
cross-entropy alone, and cross-entropy plus KL to a frozen copy. The peak is that of the process's resident memory, read
every 2 ms by a second thread; each case runs in a process of its own.

    python -m bench.memory_vocab            # writes bench/results/memory_vocab.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

RESULTS = Path(__file__).parent / "results" / "memory_vocab.json"
ROWS, LENGTH = 8, 2048


class Peak:
    """The highest resident memory while it runs, in bytes."""

    def __enter__(self) -> Self:
        import psutil

        self.process, self.bytes, self.on = psutil.Process(), 0, True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.on:
            self.bytes = max(self.bytes, self.process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.on = False
        self.thread.join()


def build():
    import transformers as tf

    config = tf.Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return tf.Qwen2ForCausalLM(config).train()


def measure(case: str, rows: int) -> dict:
    import psutil
    import torch

    from tutelage.core.anatomy import anatomy
    from tutelage.core.out import cross_entropy, forward, kl

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = psutil.Process().memory_info().rss
    model, reference = build(), None
    parts = anatomy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    for parameter in model.parameters():  # gradients and states exist before the measured step
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if case == "kl":
        reference = build().requires_grad_(False).eval()
        reference.load_state_dict(model.state_dict())
    states = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    weights = sum(p.nbytes for p in model.parameters())
    frozen = sum(p.nbytes for p in reference.parameters()) if reference is not None else 0
    held = 2 * weights + states + frozen
    tokens = torch.randint(0, 151_936, (rows, LENGTH + 1))
    start = time.perf_counter()
    with Peak() as peak:
        for row in tokens:
            out = forward(model, {"input_ids": row[None, :-1]}, anatomy=parts)
            loss = cross_entropy(out, row[None, 1:])
            total = loss.total
            if reference is not None:
                with torch.no_grad():
                    ref = forward(reference, {"input_ids": row[None, :-1]}, anatomy=anatomy(reference))
                total = total + 0.1 * kl(out, ref).total
            (total / tokens[:, 1:].numel()).backward()
            del out, loss, total
        optimizer.step()
    seconds = time.perf_counter() - start
    return {
        "case": case,
        "tokens": rows * LENGTH,
        "seconds": round(seconds, 1),
        "held_gb": round(held / 1e9, 3),
        "imports_gb": round(base / 1e9, 3),
        "peak_gb": round(peak.bytes / 1e9, 3),
        "above_gb": round((peak.bytes - held - base) / 1e9, 3),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=["ce", "kl"])
    parser.add_argument("--rows", type=int, default=ROWS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(args.case, args.rows)))
        return
    from bench.turns import append

    for case in ("ce", "kl"):
        command = [sys.executable, "-m", "bench.memory_vocab", "--case", case, "--rows", str(args.rows)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(found, flush=True)
        append(RESULTS, found)


if __name__ == "__main__":
    main()
