"""The plan tells what a run will do, from what is there, and leaves everything as it was."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.toy import graph, numbers
from tutelage import plan_text, planning, sampling, sizing
from tutelage.base.spec import SourceSpec
from tutelage.core import loop, memory
from tutelage.core.run import run_graph
from tutelage.methods.curriculum.length_buckets import LengthBuckets
from tutelage.modalities.text import tokenizer


def run(built: Any, only: str | None = None) -> Any:
    return run_graph(built, only=only, jobs=0, drift="refuse", tell=lambda stage, said: None)


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in rows}


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def shown(built: Any) -> str:
    out = io.StringIO()
    plan_text.show(built, Console(file=out, width=400, highlight=False))
    return out.getvalue()


def test_what_is_planned_is_what_a_run_then_does(tmp_path):
    rows = by_name(planning.plan(graph(tmp_path)))
    assert not (tmp_path / "runs").exists(), "a plan writes nothing"
    assert run(graph(tmp_path)).done == ["one", "two"]
    for name in ("one", "two"):
        row, (*_, last) = rows[name], numbers(tmp_path / "runs" / "toy" / name / "1", kind="train")
        assert (row["state"], row["steps"], row["rows"], row["length"]) == ("new", last["step"], 8, 32)
        assert row["flops"] == pytest.approx(last["flops"], rel=0.06)  # padding has no logits
        assert row["data"]["a" if name == "one" else "b"]["tokens"] * row["epochs"] == pytest.approx(row["tokens"])
        assert row["memory"]["micro"] == 4 and row["memory"]["total"] < row["memory"]["available"]
        kept = sorted((tmp_path / "runs" / "toy" / name / "1" / "state").glob("*/*.safetensors"))
        assert row["disk"]["checkpoints"] == pytest.approx(sum(path.stat().st_size for path in kept), rel=0.2)
        assert row["seconds"] > 0 and "guess" in row["seconds_from"]


def test_what_is_there_is_reused_and_what_changed_is_told_as_a_difference(tmp_path):
    run(graph(tmp_path))
    before = files(tmp_path / "runs")

    def more(recipe: dict[str, Any]) -> None:
        recipe["stages"]["two"]["optim"] = {"use": "optim/adamw", "lr": 2e-2}
        recipe["stages"]["three"] = {**recipe["stages"]["two"], "start": "two"}

    rows = by_name(planning.plan(graph(tmp_path, change=more)))
    assert rows["one"]["state"] == "done" and "bits_per_byte/a" in rows["one"]["values"]
    assert rows["two"]["state"] == "changed" and "optim.lr: 0.01 → 0.02" in rows["two"]["difference"]
    assert rows["three"]["state"] == "new"
    assert rows["two"]["data"]["b"]["known"] == "exact", "its tokens were counted in the run"
    assert rows["two"]["seconds_from"] == f"the speed of {tmp_path / 'runs' / 'toy' / 'two' / '1'}"
    assert files(tmp_path / "runs") == before
    assert "there already" in shown(graph(tmp_path)) and files(tmp_path / "runs") == before


def test_a_cut_stage_is_told_to_go_on(tmp_path, monkeypatch):
    record = loop.record

    def stopping(at: Any, *args: Any, **kwargs: Any) -> None:
        record(at, *args, **kwargs)
        if at.clock.step == 6:
            raise loop.Stopped("test")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "record", stopping)
        assert run(graph(tmp_path)).stopped == ["one"]
    row = by_name(planning.plan(graph(tmp_path)))["one"]
    assert (row["state"], row["done_steps"], row["steps"]) == ("partial", 4, 12)
    assert "goes on from step 4" in shown(graph(tmp_path))


def test_what_hangs_on_a_result_is_known_when_that_is_there(tmp_path):
    def arms(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        stages["two"]["sweep"] = {"low": {"seed": 1}, "high": {"seed": 2}}
        stages["last"] = {
            "start": ["one", {"best": ["two--*"], "by": "mean"}],
            "apply": {"use": "merge/linear", "weights": [0.5, 0.5]},
            "length": 32,
        }
        stages["after"] = {**stages["two"], "start": "last"}
        del stages["after"]["sweep"]

    rows = by_name(planning.plan(graph(tmp_path, change=arms)))
    assert rows["last"]["state"] == rows["after"]["state"] == "unknown"
    assert rows["last"]["waits"] == ["two--low", "two--high"] == rows["after"]["waits"]
    assert rows["after"]["params"] == rows["one"]["params"], "the shape is known all the same"
    assert "known when two--low and two--high are done" in shown(graph(tmp_path, change=arms))
    run(graph(tmp_path, change=arms), only="two--low")
    run(graph(tmp_path, change=arms), only="two--high")
    later = by_name(planning.plan(graph(tmp_path, change=arms)))
    assert later["last"]["state"] == "new" and later["after"]["state"] == "new"


def test_rows_that_a_stage_has_not_written_have_no_length_yet(tmp_path):
    def written(recipe: dict[str, Any]) -> None:
        writer = {"start": "one", "make": {"use": "synth/self_samples", "passages": 4, "length": 16}, "length": 32}
        recipe["stages"]["texts"] = writer
        recipe["stages"]["two"] |= {"data": {"own": {"stage": "texts"}}, "until": "2epoch"}

    row = by_name(planning.plan(graph(tmp_path, change=written)))["two"]
    assert row["data"]["own"]["tokens"] is None and row["data"]["own"]["known"] == "known when texts is done"
    assert "steps" not in row and row["notes"] == ["steps: known when the length of own is"]
    assert row["memory"]["total"] > 0


def test_a_tokenizer_that_is_trained_on_rows_to_come_is_known_when_they_are_there(tmp_path):
    def filtered(recipe: dict[str, Any]) -> None:
        one = recipe["stages"]["one"]
        learned = {**one, "tokenizer": {"train": "bpe", "vocab": 300}, "data": {"kept": {"stage": "kept"}}}
        recipe["stages"] = {"kept": {"make": "filter/near_duplicates", "data": one["data"]}, "one": learned}

    row = by_name(planning.plan(graph(tmp_path, change=filtered)))["one"]
    assert row["notes"] == ["sizes are known when kept is done"]
    assert run(graph(tmp_path, change=filtered), only="kept").done == ["kept"]
    assert by_name(planning.plan(graph(tmp_path, change=filtered)))["one"]["vocab"] <= 300


def test_a_sample_tells_about_as_many_tokens_as_there_are(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.jsonl").write_text("".join(f'{{"text": "{"word " * (j % 40 + 1)}"}}\n' for j in range(2000)))
    spec, bytes_ = SourceSpec(path=str(folder), val="10%"), tokenizer.bytes_tokenizer()
    found = sampling.amount("x", spec, processor=bytes_, cache=tmp_path / "none", rows=None)
    lines = "".join(path.read_text() for path in folder.iterdir()).splitlines()
    whole = sum(len(line) - len('{"text": ""}') + 1 for line in lines)
    assert found.tokens == pytest.approx(0.9 * whole, rel=0.05) and found.known.startswith("a sample of")


def test_a_tokenizer_that_is_trained_in_the_run_is_trained_on_a_sample_for_the_plan(tmp_path):
    def bpe(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["tokenizer"] = {"train": "bpe", "vocab": 280}

    rows = by_name(planning.plan(graph(tmp_path, change=bpe)))
    assert rows["one"]["vocab"] == rows["two"]["vocab"] == 280 and not (tmp_path / "runs").exists()
    assert "trained on the sample alone" in rows["one"]["notes"][0]
    run(graph(tmp_path, change=bpe), only="one")
    row = by_name(planning.plan(graph(tmp_path, change=bpe)))["two"]
    assert row["notes"] == [] and rows["two"]["data"]["b"]["tokens"] == pytest.approx(
        row["data"]["b"]["tokens"], rel=0.1
    )


def test_too_little_memory_names_what_to_lower(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1_000_000)
    row = by_name(planning.plan(graph(tmp_path)))["one"]
    assert row["memory"]["total"] > 1_000_000
    assert {"engine.micro", "length"} <= set(row["memory"]["lower"])
    assert all(total < row["memory"]["total"] for _, total in row["memory"]["lower"].values())
    assert "lower one of: engine.micro: 2 →" in shown(graph(tmp_path))


def test_frozen_and_wrapped_weights_are_counted_as_such(tmp_path):
    def lora(recipe: dict[str, Any]) -> None:
        recipe["stages"]["two"]["methods"] = [{"use": "param/lora", "r": 4}]
        recipe["stages"]["three"] = {**recipe["stages"]["one"], "start": "one", "train": ["role:norm"]}
        del recipe["stages"]["three"]["tokenizer"]

    rows = by_name(planning.plan(graph(tmp_path, change=lora)))
    one, two, three = (rows[name] for name in ("one", "two", "three"))
    assert one["trained"] == one["params"] and two["trained"] < one["params"] / 5 and three["trained"] == 5 * 32
    assert two["memory"]["optimizer"] == 2 * two["memory"]["gradients"] < one["memory"]["optimizer"]
    assert three["flops"] < 0.75 * one["flops"]


@pytest.mark.parametrize(("until", "steps"), [("1epoch", 0), ("100sample", 13), ("6400tok", 25), ("50%", 0)])
def test_spans_in_every_unit_come_to_steps(tmp_path, until, steps):
    def change(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["until"] = until

    row = by_name(planning.plan(graph(tmp_path, change=change)))["one"]
    tokens = row["data"]["a"]["tokens"]
    assert row["steps"] == (steps or -(-tokens * (0.5 if until == "50%" else 1) // 256))


def test_sources_that_a_curriculum_cuts_are_counted_by_their_pieces(tmp_path: Path, monkeypatch) -> None:
    """Few documents fill a row of 64, and what is left over below 16 is no piece."""

    def cut(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        stages["two"] |= {
            "length": 64,
            "until": "1epoch",
            "curriculum": {"use": "curriculum/length_buckets", "shortest": 16},
        }
        stages["whole"] = {key: value for key, value in stages["two"].items() if key != "curriculum"}

    monkeypatch.setattr(sizing, "peak", lambda device, threads: 1e9)
    rows = by_name(planning.plan(graph(tmp_path, steps=2, change=cut)))
    two, found = rows["two"], rows["two"]["data"]["b"]
    assert set(found["lengths"]) == {16, 32, 64} and found["tokens"] < 0.95 * rows["whole"]["data"]["b"]["tokens"]
    assert rows["whole"]["data"]["b"]["lengths"] == {}
    assert run(graph(tmp_path, steps=2, change=cut), only="two").done == ["one", "two"]
    last = numbers(tmp_path / "runs" / "toy" / "two" / "1", kind="train")[-1]
    assert two["steps"] == pytest.approx(last["step"], abs=1)
    assert two["flops"] / two["tokens"] == pytest.approx(last["flops"] / last["tokens"], rel=0.03)
    assert rows["whole"]["flops"] / rows["whole"]["tokens"] > 1.05 * two["flops"] / two["tokens"]
    node = graph(tmp_path, steps=2, change=cut).nodes["two"]
    words = tokenizer.load(str(tmp_path / "runs/toy/one/1/artifact/model"))
    how = {"processor": words, "cache": tmp_path / "runs/.data", "rows": None, "length": 64}
    known = sampling.amount("b", node.stage.data["b"], cut=LengthBuckets(shortest=16).cut, **how)
    assert known.stored and known.tokens == pytest.approx(found["tokens"], rel=0.05)


def test_minutes_are_counted_by_the_speed_there_is(tmp_path, monkeypatch):
    def change(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["until"] = "2min"

    monkeypatch.setattr(sizing, "peak", lambda device, threads: 1e9)
    row = by_name(planning.plan(graph(tmp_path, change=change)))["one"]
    assert row["seconds"] == pytest.approx(120, rel=0.05)


def test_what_is_computed_beside_the_steps_has_lines_of_its_own(tmp_path: Path) -> None:

    def more(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        stages["two"]["methods"] = [{"use": "continual/ewc", "of": "one", "rows": 24, "strength": 1.0}, "continual/lwf"]
        stages["two"]["mix"] = {"use": "mix/skill_it", "pilot": 5}
        stages["eva"] = {**stages["two"], "mix": "mix/fixed", "methods": [{"use": "param/eva", "r": 4, "passages": 40}]}
        stages["words"] = {
            "start": "one",
            "make": {"use": "synth/self_samples", "passages": 12, "length": 16},
            "engine": {"device": "cpu"},
        }

    rows = {row["stage"]: row for row in planning.plan(graph(tmp_path, steps=10, change=more))}
    two, words = rows["two"], rows["words"]
    each = two["flops"] / (10 * 8)
    tried, begun, frozen = two["besides"]
    assert tried["flops"] == pytest.approx(5 * 8 * each) and "5 steps on each of 1 sources" in tried["what"]
    assert begun["flops"] == pytest.approx(24 * each) and "24 rows" in begun["what"]
    assert 0.25 * two["flops"] < frozen["flops"] < 0.45 * two["flops"], "a forward pass is about a third of a step"
    assert words["besides"][0]["flops"] == pytest.approx(12 * frozen["flops"] / 80 / 2, rel=0.2), (
        "half as long, no gradient"
    )
    (looked,) = rows["eva"]["besides"]
    assert looked["flops"] == pytest.approx(40 * frozen["flops"] / 80, rel=0.2) and "40 rows" in looked["what"]
    assert not rows["one"]["besides"] and begun["seconds"] > 0
    said = plan_text.lines(two) + plan_text.lines(words)
    assert sum(line.startswith("  besides   ") for line in said) == 4
