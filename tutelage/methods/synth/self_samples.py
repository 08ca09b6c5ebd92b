"""Samples of the start model: passages it writes by itself, saved before it learns anything new.

Paper:   Sun et al. 2020 (LAMOL), arXiv:1909.03329; Huang et al. 2024 (self-synthesized rehearsal), arXiv:2403.01244
Use:     made by `keep: self` for weights whose data nobody has; 256 passages measure well, replay wants thousands
Works:   causal and encoder-decoder models; a masked one fills in blanks, in an order drawn by chance
Costs:   `passages` × `length` tokens of generation, once
With:    what continual/replay `of: self` rehearses and probe/forgetting measures
Differs: unconditional passages from an empty prompt, neither task prompts as in LAMOL nor refined and chosen ones, and
    drawn from all tokens, where LAMOL's code draws from the 20 likeliest; the start is not trained to write them; a
    model that writes nothing but empty or repetitive ones writes once more at four times the temperature
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen

HOTTER = 4.0  # of small and fresh T5s, some write only ends and repetitions at 1 and 2, and none at 4


class SelfSamples(Method):
    passages: int = Field(256, ge=1, description="passages to keep")
    length: int = Field(256, ge=8, description="tokens of a passage, at most")
    temperature: float = Field(1.0, ge=0, description="1 samples what the model knows, less only what it prefers")
    top_p: float = Field(1.0, gt=0, le=1, description="share of the probability that is sampled from")
    rows: int = Field(16, ge=1, description="passages written at once")

    no_off = "it makes data, and a stage without it makes none"
    baseline = {"use": "synth/self_samples", "passages": 2, "length": 16}
    on = {"passages": 8, "length": 16}

    def make(self, sources: dict[str, Any], view: Any) -> Iterator[dict[str, Any]]:
        """Rows of text. Empty, repetitive and repeated passages are written again, at most twice as many in all.

        Where none is left, as many as asked for once more, hotter: `temperature` in the artifact's counts says so.
        """
        kept, dropped, seen = 0, 0, set()
        usual = 2 * self.passages
        for start in [*range(0, usual, self.rows), *range(usual, usual + self.passages, self.rows)]:
            heat = self.temperature * (HOTTER if start >= usual else 1.0)
            if start >= usual and "temperature" not in self.state:
                if kept or not heat:
                    break
                self.state["temperature"] = heat
            texts = view.generate(
                prompts=[""] * min(self.rows, (usual if start < usual else usual + self.passages) - start),
                tokens=self.length,
                seed=view.seed_of(f"passages|{start}"),
                temperature=heat,
                top_p=self.top_p,
                rows=self.rows,
            )
            for text in texts:
                if kept == self.passages:
                    return
                if text in seen or degenerate(text):
                    dropped += 1
                    self.state["dropped"] = dropped
                    continue
                seen.add(text)
                yield {"text": text, "id": f"self-{kept}", "made_by": self.name()}
                kept += 1
        if not kept:
            raise UserError(
                f"synth/self_samples: all of {dropped} passages were empty or repetitive; "
                "name what to keep under `keep:` instead"
            )


def degenerate(text: str, *, width: int = 8, least: float = 0.1) -> bool:
    """Whether nothing is said, or the same over and over: few of its stretches of `width` characters differ."""
    text = text.strip()
    stretches = [text[i : i + width] for i in range(len(text) - width + 1)]
    return not text or (bool(stretches) and len(set(stretches)) < least * len(stretches))


def effect(run: Seen) -> dict[str, float]:
    files = sorted((run.folder / "artifact" / "data").glob("*.jsonl"))
    return {"passages": float(sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["passages"] > off["passages"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"methods": [{"use": "continual/replay", "of": "samples", "rate": 0.05}]},
    metric="forgetting/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [3e-4, 1e-3, 3e-3]},
    tune_baseline={"optim.lr": [3e-4, 1e-3, 3e-3]},
    tune_by="bits_per_byte",
    scale="claimed with 20 % pseudo-samples on GPT-2 (LAMOL), and on 7 B models (self-synthesized rehearsal)",
)
