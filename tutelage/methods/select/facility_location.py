"""Facility location (INGENIOUS): learn from a subset that stands for all data in the model's own eyes, and is drawn anew.

Paper:   Renduchintala et al. 2023 (INGENIOUS), arXiv:2305.06677, and its public code
Use:     data that say much the same many times, and many passes over them: to look at everything once takes a third of
    what learning from it does; `fraction` 25 %; `warm` until the features mean something; `temperature` 1 as in the
    paper, at which all but the first ten of a partition are drawn nearly alike where features are (a model of 1 M after
    120 steps: nearly all gains below 0.1, their median 0.002), 0.001–0.01 to tell those apart, too
Works:   decoders and models that see both sides, text, any packing; not encoder-decoder models. Chunks are embedded alone
    and whole, whatever they share rows with later
Costs:   at each embedding a forward pass over all data, counted for the stage, and on a CPU about a second for ten
    thousand chunks in partitions of a thousand, which is not counted; two numbers a chunk are kept
With:    takes the place of a curriculum; any mix (each source gives the same fraction), packing and objective
Differs: what is chosen is a chunk, the part of a document that fits in a row; a partition has `partition` chunks, where
    their code has 1,500 partitions; the lazy greedy is exact, theirs a stochastic one; similarities below 0 count as 0;
    with `embed: each` gains come from the model as it is at each refresh, with `once` from the end of the warm-up, as in
    their code, which only samples again; their code averages sentence A of a pair with its masks, here all of a chunk
    without any. `warm` and `every` are not theirs, which learned from everything for one epoch or two and drew anew after a
    fortieth or a twentieth of all steps; `layer` is their BERT's, where their GPT-2 took the last. Their partitions have
    some 27,700 chunks, and gains grow with that, so a `temperature` means another thing here
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from heapq import heapify, heappop, heapreplace
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from safetensors.torch import load_file
from torch import Tensor, nn

from tutelage.base.clock import Span, SpanField
from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.portion import read

ROWS = 16  # chunks embedded at once
ROUND = 16  # the rows of such a batch are as long as a multiple of this, so that few shapes are counted


class FacilityLocation(Method):
    fraction: Annotated[float, BeforeValidator(read)] = Field(
        0.25, gt=0, le=1, description="share of each source's chunks in the subset: `25%` or 0.25; 1: everything"
    )
    warm: SpanField = Field(Span(10.0, "%"), description="how long everything is learned from at first")
    every: SpanField = Field(Span(15.0, "%"), description="how long a subset lasts; 0step: to the end")
    embed: Literal["each", "once"] = Field(
        "each", description="whether the data are embedded for each subset, or for the first alone"
    )
    layer: Annotated[float, BeforeValidator(read)] = Field(
        0.75, gt=0, le=1, description="the block whose output is averaged, as a share of the depth (BERT's ninth of 12)"
    )
    partition: int = Field(1000, ge=2, description="most chunks of a random part, among which similarities are taken")
    temperature: float = Field(1.0, gt=0, description="gains are divided by it: lower trusts them more")

    off = {"fraction": 1.0}
    on = {"fraction": 0.25, "warm": "3step", "every": "4step", "partition": 40, "temperature": 0.02}

    def begin(self, model: nn.Module, view: Any) -> None:
        if view.engine.anatomy.kind == "seq2seq":
            raise UserError(
                "select/facility_location: an encoder-decoder model reads no chunk as a whole, so it has no embedding of one; "
                "take a decoder or a model that sees both sides, or select/repeated_random"
            )

    def pick(self, view: Any) -> dict[str, Tensor] | None:
        """The chunks of the next subset, where it is time for one."""
        if self.fraction == 1 or view.clock.passed(self.warm) < 1.0 - 1e-9:
            return None
        now = view.clock.passed(self.every) if self.every.value else 0.0
        began = self.state.setdefault("began", now)
        number = int(now - began + 1e-9)
        if number <= self.state.get("subset", -1):
            return None
        self.state["subset"] = number
        if self.embed == "each" or "gains" not in self.state:
            found = [self.graded(name, view) for name in view.sources]
            self.state["gains"] = {str(i): gains for i, (gains, _) in enumerate(found)}
            self.state["parts"] = {str(i): parts for i, (_, parts) in enumerate(found)}
        rng = view.rng("subset")
        return {
            name: sampled(self.state["gains"][str(i)], self.state["parts"][str(i)], self, rng)
            for i, name in enumerate(view.sources)
        }

    def graded(self, name: str, view: Any) -> tuple[Tensor, Tensor]:
        """Each chunk's gain, [N] float64, and the number of its partition, [N]."""
        data = view.source(name)
        count = len(data.sources[name].chunks)
        order = torch.randperm(count, generator=view.rng(f"partitions|{name}"))
        parts_N = torch.empty(count, dtype=torch.int64)
        gains_N = torch.zeros(count, dtype=torch.float64)
        for number, members in enumerate(order.tensor_split(-(-count // self.partition))):
            features_ND = self.features(data, name, members, view)
            kernel = partial(similarities, features_ND)
            picked, gains = greedy(view.counted(("kernel", features_ND.shape), kernel))
            gains_N[members[picked]] = torch.from_numpy(gains)
            parts_N[members] = number
        return gains_N, parts_N

    def features(self, data: Any, name: str, members: Tensor, view: Any) -> Tensor:
        """The mean hidden state of each of these chunks, [N, D] float64 on the CPU; the work shared by the ranks."""
        sizes = torch.from_numpy(data.sources[name].chunks[members.numpy(), 2]).clamp(max=data.length)
        world, found = view.engine.world, None
        for number, places in enumerate(batches(sizes)):
            if number % world.size != world.rank:
                continue
            batch = data.alone(name, members[places].tolist())
            key = ("embed", *(tuple(value.shape) for value in batch.fields.values()))
            mean_BD = view.counted(key, partial(self.embedded, batch, view))
            found = mean_BD.new_zeros(len(members), mean_BD.shape[1]) if found is None else found
            found[places] = mean_BD
        if found is None:  # more ranks than batches
            found = torch.zeros(len(members), view.engine.anatomy.hidden, dtype=torch.float64)
        return view.sum(found.to(view.engine.device)).cpu()

    def embedded(self, batch: Any, view: Any) -> Tensor:
        """The mean over each row's positions of a block's output, [B, D] float64."""
        states = view.model(batch, needs=frozenset({"hidden"})).hidden_states  # the embedding's and each block's
        hidden_BTD = states[round(self.layer * (len(states) - 1))].double()
        there_BT1 = (batch["segments"] > 0).to(hidden_BTD)[..., None]
        return ((hidden_BTD * there_BT1).sum(dim=1) / there_BT1.sum(dim=1)).cpu()


def batches(sizes: Tensor) -> Iterator[Tensor]:
    """Places of chunks that are embedded together, at most ROWS of one rounded size, smallest first."""
    rounded = (sizes + ROUND - 1) // ROUND
    for size in rounded.unique().tolist():
        yield from (rounded == size).nonzero().flatten().split(ROWS)


def similarities(features_ND: Tensor) -> np.ndarray:
    """Cosines of all pairs, those below 0 as 0, [N, N]."""
    unit_ND = torch.nn.functional.normalize(features_ND, dim=1)
    found: np.ndarray = (unit_ND @ unit_ND.T).clamp(min=0).numpy()
    return found


def greedy(similar_NN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All elements in the order of the greedy maximum of f(A) = Σᵢ max of sᵢⱼ over j in A, and what each adds, [N] both.

    Lazy (Minoux 1978): what an element adds never grows as A does, so what it added to a smaller A bounds it.
    """
    covered = np.zeros(len(similar_NN))
    heap = [(-gain, j) for j, gain in enumerate(similar_NN.sum(axis=0).tolist())]
    heapify(heap)
    order, gains = [], []
    while heap:
        _, j = heap[0]
        found = (-float(np.maximum(similar_NN[:, j] - covered, 0.0).sum()), j)
        heapreplace(heap, found)
        if heap[0] == found:
            heappop(heap)
            order.append(j)
            gains.append(-found[0])
            covered = np.maximum(covered, similar_NN[:, j])
    return np.array(order), np.array(gains)


def taylor_softmax(gains_N: Tensor) -> Tensor:
    """(1 + g + g²/2) of each over the sum of all: chances that fall with the gain, and never to nothing, [N]."""
    weights_N = 1 + gains_N + gains_N**2 / 2
    return weights_N / weights_N.sum()


def sampled(gains_N: Tensor, parts_N: Tensor, method: FacilityLocation, rng: torch.Generator) -> Tensor:
    """Numbers of a subset's chunks, ascending: of each partition its share, one after the other by their chances."""
    gains_N, parts_N, found = gains_N.cpu(), parts_N.cpu(), []
    for number in parts_N.unique().tolist():
        members = (parts_N == number).nonzero().flatten()
        count = max(1, min(len(members) - 1, int(np.ceil(len(members) * method.fraction - 1e-9))))
        chances = taylor_softmax(gains_N[members] / method.temperature)
        found.append(members[torch.multinomial(chances, count, generator=rng)])
    return torch.cat(found).sort().values


def effect(run: Seen) -> dict[str, float]:
    """Subsets drawn, the share of the chunks in one, and the mean gain of its chunks over that of all.

    `steps` drew from one; `looked` are those of over twice the least work, at which the data were embedded;
    `covered` is the sum of all gains a chunk: 1, as in the end each chunk is stood for by itself.
    """
    rows = [row for row in run.rows if row["kind"] == "train"]
    took = [later["flops"] - row["flops"] for row, later in pairwise(rows)]
    found = {"subsets": 0.0, "share": 1.0, "gain": 1.0, "steps": 0.0, "covered": 0.0}
    found["looked"] = float(sum(each > 2 * min(took) for each in took))
    places = sorted((run.folder / "picked").glob("*/*.safetensors"))
    if places:
        kept = load_file(max((run.folder / "state").glob("*/methods.safetensors")))
        gains = next(value for name, value in kept.items() if name.endswith("gains/0"))
        chosen = next(iter(load_file(places[-1]).values()))
        found["share"] = len(chosen) / len(gains)
        found["gain"] = float(gains[chosen].mean() / gains.mean())
        found["covered"] = float(gains.sum()) / len(gains)
        found["subsets"] = float(len({json.dumps(next(iter(load_file(place).values())).tolist()) for place in places}))
        found["steps"] = float(sum("picked" in row for row in rows))
    return found


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """After three steps of everything three different subsets of a quarter, of chunks that add more than most do, each of
    what the model saw then."""
    drawn = on["subsets"] == 3 and on["steps"] == 9 and 0.24 < on["share"] < 0.27
    weighed = abs(on["covered"] - 1) < 1e-6 and on["gain"] > 1.5
    return drawn and weighed and on["looked"] == 3 and off["looked"] == 0 and off["subsets"] == 0


DATA = {"copied": {"use": "bench.duplicated:Copied", "args": {"passages": 200}, "val": 0}}

BENCH = Bench(  # with features of the warm-up's end alone, as in their code; the baseline has no warm-up on everything
    base="recipes/bench/duplicated.yaml",
    arm={
        "data": DATA,
        "curriculum": {"use": "select/facility_location", "fraction": 0.25, "embed": "once"},
        "until": "4.5e12flop",
    },
    baseline={
        "data": DATA,
        "curriculum": {"use": "select/repeated_random", "fraction": 0.25},
        "until": "4.5e12flop",
    },
    metric="bits_per_byte/clean",
    better="lower",
    margin=0.01,
    tune={"curriculum.temperature": [0.001, 1.0], "optim.lr": [1.5e-3, 3e-3, 6e-3]},
    tune_baseline={"optim.lr": [1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3]},
    scale="BERT, BioBERT and GPT-2, pre-trained on a quarter of each one's corpus: up to about 99 % of what all of it gives",
)
