"""Recipes that cover papers: they resolve, and one that needs a user's models runs on tiny ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.endpoint import Endpoint
from tests.recipes import families
from tutelage import modalities
from tutelage.base import load
from tutelage.catalog import rows
from tutelage.claims import ROOT
from tutelage.core.graph import Graph
from tutelage.core.run import run_graph
from tutelage.methods.synth.entity_graph import PROMPTS

ADAPT = "recipes/quickstart/adapt-instruct.yaml"  # its paths are the user's to fill in
COVERING = sorted({name for row in rows.rows() for name in row.covered_by if name.startswith("recipes/")} - {ADAPT})


@pytest.mark.parametrize("name", COVERING)
def test_a_recipe_that_covers_a_paper_resolves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = load.load(Path(name))
    graph = Graph.resolve(made, name="covering", modality=modalities.find(made.modality or "text"), runs=tmp_path)
    assert graph.nodes


def test_a_base_is_adapted_and_what_instruction_tuning_added_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paper 48: base + (domain − base) + (instruct − base), to the weights."""
    recipe = (ROOT / ADAPT).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    families.few_passages(monkeypatch, 8)
    families.folder("llama", Path("base"))
    families.folder("llama", Path("instruct"))
    base = load_file("base/model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in base.items()}, "instruct/model.safetensors", {"format": "pt"})
    families.jsonl(Path("data/one.jsonl"), [{"text": text} for text in families.sentences(60)])
    Path("adapt.yaml").write_text(recipe, encoding="utf-8")
    small = {"length": "32", "batch": "4sample", "until": "3step", "data.mine.val": "20%", "evals.final": "4"}
    made = load.load(Path("adapt.yaml"), sets=[f"stages.domain.{key}={value}" for key, value in small.items()])
    graph = Graph.resolve(made, name="adapt", modality=modalities.find("text"), runs=Path("runs"))
    assert not run_graph(graph, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None).failed
    domain, merged = (
        load_file(f"runs/adapt/{stage}/1/artifact/model/model.safetensors") for stage in ("domain", "instruct")
    )
    moved = max(float((domain[name] - tensor).abs().max()) for name, tensor in base.items())
    assert moved > 1e-6, "the base learned something"
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, domain[name] + 0.01, atol=1e-6, rtol=0)


def test_a_few_pages_are_told_by_a_model_behind_an_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's own pages, of which the writer says that they speak of three things."""
    monkeypatch.chdir(ROOT)

    def reply(question: dict[str, Any], handler: Any) -> str:
        text = question["messages"][0]["content"]
        if text.startswith(PROMPTS["entities"]):
            return json.dumps({"summary": text[-80:], "entities": ["stage", "recipe", "run"]})
        return "### " + " and ".join(line for line in text.splitlines()[-3:] if line.startswith("- "))

    endpoint = Endpoint(reply)
    try:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        made = load.load(Path("recipes/papers/259-synthetic-continued-pretraining.yaml"))
        graph = Graph.resolve(made, name="told", modality=modalities.find("text"), runs=tmp_path)
        assert not run_graph(graph, only="told", jobs=0, drift="refuse", tell=lambda stage, said: None).failed
    finally:
        endpoint.close()
    rows = [json.loads(line) for line in (graph.nodes["told"].artifact / "data/rows.jsonl").read_text().splitlines()]
    pages = len(list(Path("docs").glob("*.md")))
    styles = [row["style"] for row in rows]
    assert [styles.count(style) for style in ("summary", "pair", "triplet")] == [pages, 3 * pages, pages]
    assert {question["model"] for question in endpoint.asked} == {"instruct"}
