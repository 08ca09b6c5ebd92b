"""Facility location: the greedy beside a plain one, the chances beside the formula, and what a stage draws then."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.methods.small import Texts, batch_of, collate, view_of
from tests.toy import graph, numbers
from tutelage.base import load
from tutelage.base.clock import Clock
from tutelage.base.errors import UserError
from tutelage.core.run import run_graph
from tutelage.core.stage import Corpora, processor_of, start_of
from tutelage.core.types import Piece, Row
from tutelage.core.view import Data
from tutelage.look import batch_of as named
from tutelage.methods.objective.causal_lm import CausalLM
from tutelage.methods.select.facility_location import (
    FacilityLocation,
    batches,
    greedy,
    sampled,
    similarities,
    taylor_softmax,
)


@pytest.mark.parametrize("seed", range(5))
def test_of_all_that_are_left_the_lazy_greedy_takes_one_that_adds_most(seed: int) -> None:
    similar = similarities(torch.randn(24, 5, generator=torch.Generator().manual_seed(seed)).double())
    order, gains = greedy(similar)
    assert sorted(order.tolist()) == list(range(24))
    for i, gain in enumerate(gains):
        before = similar[:, order[:i]].max(axis=1).sum() if i else 0.0
        added = [similar[:, [*order[:i], j]].max(axis=1).sum() - before for j in order[i:]]
        assert gain == pytest.approx(added[0]) and gain == pytest.approx(max(added))
    assert gains.sum() == pytest.approx(24)  # in the end each stands for itself


def test_three_by_hand() -> None:
    """The second stands for all best (1 + 0.8 + 0.5); then what is far from it adds more than its neighbor."""
    similar = np.array([[1.0, 0.8, 0.1], [0.8, 1.0, 0.5], [0.1, 0.5, 1.0]])
    order, gains = greedy(similar)
    assert order.tolist() == [1, 2, 0] and gains == pytest.approx([2.3, 0.5, 0.2])


def test_a_copy_adds_nothing() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]).double()
    order, gains = greedy(similarities(features))
    assert order[-1] in (0, 2) and gains[-1] == pytest.approx(0.0) and min(gains[:-1]) > 0.1


def test_similarity_is_the_cosine_and_never_negative() -> None:
    found = similarities(torch.tensor([[3.0, 4.0], [4.0, 3.0], [-3.0, -4.0]]).double())
    assert found == pytest.approx(np.array([[1, 0.96, 0], [0.96, 1, 0], [0, 0, 1]]))


def test_chances_are_taylor_s_softmax_of_the_second_order() -> None:
    found = taylor_softmax(torch.tensor([0.0, 1.0, 2.0]))
    assert found.tolist() == pytest.approx([1 / 8.5, 2.5 / 8.5, 5 / 8.5])


def test_each_partition_gives_its_share_by_its_chances() -> None:
    gains = torch.tensor([9.0, 0.0, 0.0, 0.0] * 10).double()
    parts = torch.arange(40) // 20
    method, seen = FacilityLocation(fraction=0.25, temperature=0.5), torch.zeros(40)
    for seed in range(50):
        chosen = sampled(gains, parts, method, torch.Generator().manual_seed(seed))
        assert len(chosen) == 10 and (chosen < 20).sum() == 5 and chosen.equal(chosen.unique())
        seen[chosen] += 1
    assert seen[0::4].min() > 45 and seen[gains == 0].max() < 12  # 181 to 1 each


def test_chunks_of_like_size_are_embedded_together() -> None:
    sizes = torch.tensor([3, 40, 15, 17, 48, 16] * 8)
    found = list(batches(sizes))
    assert torch.cat(found).sort().values.equal(torch.arange(48)) and max(map(len, found)) <= 16
    assert all((sizes[places].max() + 15) // 16 == (sizes[places].min() + 15) // 16 for places in found)


TEXTS = ["abcabc", "a", "xyzzy xyzzy", "abcabd", "qrstuvw", "xyzzy xyzzyx"]


def seen_by(method: FacilityLocation, *, step: int = 1, texts: list[str] = TEXTS) -> Any:
    view = view_of(objective=CausalLM())
    view.clock = Clock(step=step, total={"step": 100.0})
    view.sources = ["t"]
    width = {"length": 0}

    def rows(rows: Any, sources: Any, *, length: int) -> Any:
        width["length"] = length
        return collate(rows, sources)

    view._source = lambda name: Data({"t": Texts("t", texts)}, rows, seed=0, length=48, packing="single")  # type: ignore[arg-type]
    return view


def test_a_feature_is_the_mean_state_of_the_block_that_is_asked_for_padding_aside() -> None:
    method = FacilityLocation(layer=0.5, warm="1step")
    view = seen_by(method)
    found = method.features(view.source("t"), "t", torch.tensor([2, 1, 0]), view)
    for i, text in enumerate([TEXTS[2], TEXTS[1], TEXTS[0]]):
        states = view.model(batch_of([text]), needs=frozenset({"hidden"})).hidden_states
        assert len(states) == 3
        assert found[i].numpy() == pytest.approx(states[1][0].mean(dim=0).detach().numpy(), abs=1e-5)
    assert view.engine.flops.totals["select"] > 0


def test_a_subset_is_chosen_after_the_warm_up_and_again_when_it_is_over() -> None:
    method = FacilityLocation(fraction=0.5, warm="10step", every="5step", partition=3)
    view = seen_by(method)
    when, found = [], []
    for step in range(30):
        view.clock.step = view.clock.tick = step
        chosen = method.pick(view)
        if chosen is not None:
            when.append(step)
            found.append(chosen["t"].tolist())
    assert when == [10, 15, 20, 25]
    assert all(len(one) == 4 for one in found) and len({tuple(one) for one in found}) > 1  # half of three, rounded up


@pytest.mark.parametrize(("embed", "times"), [("each", 4), ("once", 1)])
def test_data_are_embedded_for_each_subset_or_for_the_first_alone(embed: Any, times: int) -> None:
    method = FacilityLocation(fraction=0.5, warm="10step", every="5step", embed=embed, partition=6)
    view, took = seen_by(method), []
    for step in range(30):
        view.clock.step, before = step, view.engine.flops.total
        method.pick(view)
        took.append(view.engine.flops.total - before)
    assert sum(work > 0 for work in took) == times and len({work for work in took if work}) == 1


def test_an_encoder_decoder_model_is_refused_before_the_first_step() -> None:
    with pytest.raises(UserError, match="reads no chunk as a whole"):
        FacilityLocation().begin(torch.nn.Module(), view_of("t5", objective=CausalLM()))


def test_no_refresh_is_one_subset_to_the_end_and_the_whole_is_none() -> None:
    method = FacilityLocation(fraction=0.5, warm="2step", every="0step")
    view = seen_by(method)
    chosen = []
    for step in range(9):
        view.clock.step = step
        chosen.append(method.pick(view) is not None)
    assert chosen == [False, False, True] + [False] * 6
    assert FacilityLocation(fraction="100%").is_off()


def test_only_what_was_picked_is_drawn_and_any_step_is_named_again(tmp_path: Path) -> None:
    entry = {"use": "select/facility_location", "warm": "2step", "every": "4step", "partition": 50}

    def change(recipe: dict[str, Any]) -> None:
        one = recipe["stages"]["one"]
        recipe["stages"] = {"one": one}
        one |= {"curriculum": entry, "packing": "single", "evals": {"every": "none", "run": []}}

    made = graph(tmp_path, change=change, steps=16)
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed, result.failed
    folder = made.nodes["one"].folder
    assert folder is not None
    (folder.parent.parent / "recipe.yaml").write_text(load.dump(made.recipe), encoding="utf-8")
    rows = numbers(folder, kind="train")
    assert [row.get("picked") for row in rows] == [None] * 2 + [2] * 4 + [6] * 4 + [10] * 4 + [14] * 2
    picked = {
        int(place.parent.name): set(load_file(place)["a"].tolist()) for place in (folder / "picked").glob("*/*.*")
    }
    drawn = {row["tick"]: documents(named(folder, row["tick"])) for row in rows}
    assert all(len(found) == 8 for found in drawn.values())
    chunks = {tick: documents_of(made, numbers) for tick, numbers in picked.items()}
    for row in rows[2:]:
        assert set(drawn[row["tick"]]) <= chunks[row["picked"]]
    assert not set(drawn[1] + drawn[2]) <= chunks[2]
    once = drawn[3] + drawn[4] + drawn[5] + drawn[6]  # 32 of about 40: none twice
    assert len(set(once)) == len(once) == 32
    assert rows[-1]["epochs"] == pytest.approx(rows[-1]["tokens"] / source_of(made)[0].facts["tokens"])  # of everything


def documents(lines: list[str]) -> list[str]:
    """Which bytes of which document a step is said to have drawn."""
    return re.findall(r"document=\d+  bytes=\[\d+, \d+\]", " ".join(lines))


def source_of(made: Any) -> tuple[Any, Any]:
    """The source that the stage draws from, and its tokenizer."""
    node = made.nodes["one"]
    processor = processor_of(node, *start_of(node), say=lambda said: None)
    return Corpora(node, processor, lambda said: None).of("a", node.stage.data["a"]).train, processor


def documents_of(made: Any, numbers: set[int]) -> set[str]:
    """Chunks by number, as `documents` has them."""
    source, processor = source_of(made)
    rows = [Row("a", (Piece(*source.chunks[i].tolist()),)) for i in sorted(numbers)]
    lines = [
        "  ".join(f"{key}={value}" for key, value in piece.items())
        for row in rows
        for piece in made.modality.describe(row, {"a": source}, processor=processor)
    ]
    return set(documents(lines))
