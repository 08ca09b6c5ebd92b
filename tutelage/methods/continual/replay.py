"""Replay: a fixed share of every batch comes from what was learned before.

Paper:   Ibrahim et al. 2024, arXiv:2403.08763; Rolnick et al. 2019, arXiv:1811.11682
Use:     5 % for a mild change of domain, 25–50 % for a strong one (another language)
Works:   any modality; an ancestor's data, what `keep` names, or passages that the start model wrote (`of: self`)
Costs:   the share itself: at equal compute, that much less of the new data
With:    its rate is taken first and the mix divides the rest; adds to penalties and distillation
Differs: an ancestor's data are read again in the order they had, from the beginning, not sampled from a buffer;
    the share is held in rows to within one row over the whole run, not drawn by chance in each batch
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tutelage.base.method import Bench, Method, Seen


def _share(value: Any) -> Any:
    """`5%` and 0.05 are the same."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


class Replay(Method):
    of: str = Field("previous", description="a stage, `previous`, `self`, or a name under `keep`")
    rate: Annotated[float, BeforeValidator(_share)] = Field(
        0.05, ge=0, lt=1, description="share of every batch: `5%` or 0.05"
    )

    off = {"rate": 0.0}
    on = {"rate": 0.5}
    steerable = frozenset({"rate"})

    def source(self, view: Any) -> dict[str, tuple[Any, float]]:
        """The replayed sources under `of/name`; several share the rate by their size in tokens."""
        sources = view.data(self.of).sources
        whole = sum(float(source.facts["tokens"]) for source in sources.values())
        return {
            f"{self.of}/{name}": (source, self.rate * float(source.facts["tokens"]) / whole)
            for name, source in sources.items()
        }


def effect(run: Seen) -> dict[str, float]:
    """The share that is replayed, and what the old data cost at the end."""
    shares = [sum(w for n, w in row["weights"].items() if "/" in n) for row in run.rows if row["kind"] == "train"]
    last = next((row["values"] for row in reversed(run.rows) if row["kind"] == "eval"), {})
    return {"replayed": sum(shares) / len(shares), "old": last.get("bits_per_byte/a", float("nan"))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["replayed"] > 0 and off["replayed"] == 0 and on["old"] < off["old"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"methods": [{"use": "continual/replay", "rate": 0.05}]},
    metric="forgetting/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [3e-4, 1e-3, 3e-3]},
    tune_baseline={"optim.lr": [3e-4, 1e-3, 3e-3]},
    tune_by="bits_per_byte",
    scale="claimed at 405 M and 10 B parameters, 100–300 B tokens a stage",
)
