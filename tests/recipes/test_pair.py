"""A vision tower, a projector and a language model: the projector learns first, then all; resumed, exported, loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import transformers as tf

from tests.toy import numbers
from tutelage import modalities, planning
from tutelage.base import load
from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.core import loop
from tutelage.core.artifact import load_tensors
from tutelage.core.graph import Graph
from tutelage.core.run import run_graph
from tutelage.core.types import IGNORE, Piece, Row
from tutelage.look import digest_of
from tutelage.modalities.pair import images, source, store, toy
from tutelage.modalities.pair.modality import modality

LENGTH = 48


def graph(folder: Path, **changes: Any) -> Graph:
    recipe = toy.recipe(folder / "data")
    for stage in recipe["stages"].values():
        stage.update(changes)
    return Graph.resolve(load.load(recipe), name="pair", modality=modalities.find("pair"), runs=folder / "runs")


def run(folder: Path, only: str | None = None, **changes: Any) -> Any:
    return run_graph(graph(folder, **changes), only=only, jobs=0, drift="refuse", tell=lambda stage, said: None)


def stage(folder: Path, name: str) -> Path:
    return folder / "runs" / "pair" / name / "1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    assert run(folder).done == ["align", "tune"]
    return folder


@pytest.fixture(scope="module")
def processor() -> Any:
    return modality.processor(dict(toy.TOKENIZER), folder=None, texts=lambda: [], cache=Path("none"))


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_tensors(stage(folder, name) / "artifact" / "model" / "model.safetensors")


def test_the_first_stage_changes_the_projector_alone_and_the_second_the_rest(made, processor):
    torch.manual_seed(0)
    first = load_tensors(stage(made, "align") / "state" / "000000012" / "model.safetensors")
    fresh = fresh_weights(made, processor)
    assert first.keys() == fresh.keys()
    moved = {name for name in fresh if not torch.equal(first[name], fresh[name])}
    assert moved == {name for name in fresh if "projector" in name} and len(moved) == 4
    after = weights(made, "tune")
    still = {name for name in weights(made, "align") if torch.equal(after[name], weights(made, "align")[name])}
    unused = ("encoder.layers.1.", "post_layernorm")  # the features are those of the last block but one
    assert still == {name for name in after if any(part in name for part in unused)}


def fresh_weights(folder: Path, processor: Any) -> dict[str, torch.Tensor]:
    """The weights that stage `align` began with, made again from its seed."""
    from tutelage.core import randomness
    from tutelage.core.artifact import tensors_of

    node = graph(folder).nodes["align"]
    randomness.reseed(randomness.seed_of(node.seed, node.root, 0, "init"))
    return tensors_of(modality.model(None, dict(toy.MODEL), processor=processor, length=LENGTH))


def test_held_out_captions_are_predicted_better_after_each_stage(made):
    bits = [row["values"]["bits_per_byte/squares"] for n in ("align", "tune") for row in evals(made, n)]
    assert bits[0] > bits[1] == bits[2] > bits[3] + 2


def evals(folder: Path, name: str) -> list[dict[str, Any]]:
    return numbers(stage(folder, name), kind="eval")


@pytest.mark.parametrize("name", ["align", "tune"])
def test_a_cut_run_ends_in_the_same_bits(made, tmp_path, monkeypatch, name):
    record = loop.record

    def stopping(at: Any, *args: Any, **kwargs: Any) -> None:
        record(at, *args, **kwargs)
        if at.node.name == name and at.clock.step == 6:
            raise loop.Stopped("test")  # step 4 was the last that was saved

    with monkeypatch.context() as patch:
        patch.setattr(loop, "record", stopping)
        assert run(tmp_path).stopped == [name]
    run(tmp_path)
    for each in ("align", "tune"):
        assert digest_of(stage(tmp_path, each)) == digest_of(stage(made, each))
        assert numbers(stage(tmp_path, each), kind="train") == numbers(stage(made, each), kind="train")


def test_plain_transformers_loads_model_and_processor_and_gives_the_same_logits(made):
    folder = stage(made, "tune") / "artifact" / "model"
    model = tf.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    plain = tf.AutoProcessor.from_pretrained(folder)
    assert isinstance(plain, tf.LlavaProcessor) and tf.AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == [97]
    row = next(iter(toy.Squares(1)))
    theirs = plain(images=[row["image"]], text=f"<bos><image>{row['text']}<eos>", return_tensors="pt")
    ours = held(made).collate_first()
    count = theirs["input_ids"].shape[1] - 1  # the last token is a label only
    assert torch.equal(ours["tokens"][:, :count], theirs["input_ids"][:, :-1])
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], atol=1e-6)
    from tutelage.core.anatomy import anatomy
    from tutelage.core.out import forward

    with torch.no_grad():
        parts = anatomy(model)
        out = forward(model, modality.inputs(ours, anatomy=parts, packing="single"), anatomy=parts)
        logits = next(out.chunks())[0].view(*ours["tokens"].shape, -1)
        reference = model(**theirs).logits
    assert torch.allclose(logits[:, :count], reference[:, :-1], atol=1e-5)


class held:
    """The first of the squares as the modality reads it with the processor of a finished run."""

    def __init__(self, folder: Path) -> None:
        self.processor = modality.processor(
            None, folder=stage(folder, "tune") / "artifact" / "model", texts=list, cache=folder
        )
        self.cache = folder / "other"

    def collate_first(self) -> Any:
        spec = SourceSpec(use="tutelage.modalities.pair.toy:Squares", args={"count": 1}, val=0.0)
        train, _ = source.build("one", spec, self.processor, cache=self.cache, length=LENGTH)
        return modality.collate([Row("one", (Piece(*map(int, train.chunks[0])),))], {"one": train}, length=LENGTH)


def test_the_card_and_the_numbers_stand_beside_the_model(made):
    folder = stage(made, "tune") / "artifact"
    assert "library_name: transformers" in (folder / "README.md").read_text()
    assert {"metrics.jsonl", "stage.yaml", "model"} <= {path.name for path in folder.iterdir()}


def test_text_is_generated_from_a_picture(made, processor):
    folder = stage(made, "tune") / "artifact" / "model"
    model = modality.model(folder, modality.start_files(str(folder))[1], processor=processor, length=LENGTH)
    rows = list(toy.Squares(3))
    asked = [{"image": row["image"], "text": "a"} for row in rows] + ["a"]
    said = modality.generate(model, processor, prompts=asked, tokens=6, seed=0, temperature=0.0, rows=4)
    assert len(said) == 4 and all(isinstance(text, str) for text in said)
    alone = modality.generate(model, processor, prompts=asked[:1], tokens=6, seed=0, temperature=0.0)
    assert alone == said[:1], "left padding changes nothing"


@pytest.mark.slow
def test_training_on_pairs_uses_the_picture(made, tmp_path):
    """With the pictures of others, captions are told worse by a model that has learned to look."""
    result = run(tmp_path, until="150step", save={"every": "100step"})
    assert result.done == ["align", "tune"]
    folder = stage(tmp_path, "tune") / "artifact" / "model"
    processor = modality.processor(None, folder=folder, texts=list, cache=tmp_path)
    model = modality.model(folder, modality.start_files(str(folder))[1], processor=processor, length=LENGTH).eval()
    spec = SourceSpec(use="tutelage.modalities.pair.toy:Squares", args={"count": 64, "seed": 9}, val=0.0)
    unseen, _ = source.build("new", spec, processor, cache=tmp_path / "other", length=LENGTH)
    rows = [Row("new", (Piece(*map(int, chunk)),)) for chunk in unseen.chunks]
    batch = modality.collate(rows, {"new": unseen}, length=LENGTH)
    from tutelage.core.anatomy import anatomy
    from tutelage.core.out import cross_entropy, forward

    parts, losses = anatomy(model), []
    for pictures in (batch["pixel_values"], batch["pixel_values"].roll(7, dims=0)):
        given = modality.inputs(batch.having(pixel_values=pictures), anatomy=parts, packing="single")
        with torch.no_grad():
            losses.append(float(cross_entropy(forward(model, given, anatomy=parts), batch["labels"]).total))
    assert losses[0] < 0.8 * losses[1]


# -- the source -------------------------------------------------------------------------------------------------------


def test_a_picture_takes_its_patches_and_is_not_predicted(processor, tmp_path):
    spec = SourceSpec(path=toy.write(tmp_path / "data", count=20), val="20%")
    train, val = source.build("squares", spec, processor, cache=tmp_path / "cache", length=LENGTH)
    assert len(train.chunks) + len(val.chunks) == 20 and len(val.chunks) > 0
    for one in (train, val):
        piece = Piece(*map(int, one.chunks[0]))
        found, token = one.read(piece), processor.image_token_id
        text = one.name_of(piece, processor=processor)["text"].replace("<bos>", "").replace("<image>", "")
        assert found["tokens"].tolist() == [256, *[token] * 4, *text.encode()]
        end = 257 if one is train else IGNORE  # the end of a text is learned and not measured
        assert found["labels"].tolist() == [IGNORE] * 4 + [*text.encode(), end]
        assert one.counted(piece) == len(text) + (one is train)
        assert one.facts["tokens"] == one.chunks[:, 2].sum() and one.facts["images"] == 20
        assert np.isfinite(one.image(piece.doc)).all() and one.image(piece.doc).dtype == np.float32
    assert val.read(Piece(*map(int, val.chunks[0])))["bytes"].sum() == len(text)
    about = modality.describe(Row("squares", (piece,)), {"squares": val}, processor=processor)[0]
    assert about["image"].startswith("square-") and about["file"].endswith("pairs.jsonl") and about["line"] > 0


def test_a_long_text_is_cut_and_one_without_room_for_its_picture_is_left_out(processor, tmp_path):
    rows = [
        {"image": f"{i}.npy", "text": text} for i, text in enumerate(("x" * 90, "y" * 60 + "<image>" + "z", "short"))
    ]
    write(tmp_path, rows)
    train, _ = source.build(
        "x", SourceSpec(path=str(tmp_path / "x.jsonl"), val=0.0), processor, cache=tmp_path, length=32
    )
    assert sorted(train.chunks[:, 2].tolist()) == [1 + 4 + 5, 32]
    assert train.facts["cut"] == 1 and train.facts["chunks_left_out"] == 1
    assert "1 texts are cut" in train.report()[0]


def write(folder: Path, rows: list[dict[str, Any]], *, array: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(len(rows)):
        picture = rng.integers(0, 256, (3, 16, 16), np.uint8) if array is None else array
        np.save(folder / f"{i}.npy", picture)
    (folder / "x.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return folder / "x.jsonl"


def test_messages_prompts_and_text_alone_are_pairs_too(processor, tmp_path):
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "a square"}]  # fmt: skip
    chat = write(tmp_path / "chat", [{"images": [f"{i}.npy"], "messages": said} for i in range(4)])
    train, _ = source.build("c", SourceSpec(path=str(chat), val=0.0), processor, cache=tmp_path, length=99)
    found = train.read(Piece(*map(int, train.chunks[0])))
    assert (found["tokens"] == processor.image_token_id).sum() == 4
    learned = bytes(label for label in found["labels"] if 0 <= label < 256)
    assert learned.startswith(b"a square"), "answers alone are learned"
    asked = write(tmp_path / "asked", [{"image": f"{i}.npy", "prompt": "what?", "answer": "a cat"} for i in range(3)])
    spec = SourceSpec(path=str(asked), val=0.0, order="stored")
    assert not train.stored and source.build("p", spec, processor, cache=tmp_path, length=99)[0].stored
    train, _ = source.build("p", SourceSpec(path=str(asked), val=0.0), processor, cache=tmp_path, length=99)
    found = train.read(Piece(*map(int, train.chunks[0])))
    assert bytes(label for label in found["labels"] if 0 <= label < 256).strip() == b"a cat"
    mixed = write(tmp_path / "mixed", [{"image": "0.npy", "text": "seen"}, {"text": "said"}])
    train, _ = source.build("m", SourceSpec(path=str(mixed), val=0.0), processor, cache=tmp_path, length=99)
    rows = [Row("m", (Piece(*map(int, chunk)),)) for chunk in train.chunks]
    batch = modality.collate(rows, {"m": train}, length=99)
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and not batch["pixel_values"][1].any()
    model = modality.model(None, dict(toy.MODEL), processor=processor, length=99)
    from tutelage.core.anatomy import anatomy

    assert len(modality.inputs(batch, anatomy=anatomy(model), packing="single")["pixel_values"]) == 1


def test_malformed_pairs_are_named_skipped_or_fatal(processor, tmp_path):
    rows: list[dict[str, Any]] = [{"image": "0.npy", "text": "good"}, {"image": "9.npy", "text": "no file"}]
    rows += [{"image": "0.npy", "text": "<image><image>"}, {"text": "<image>none"}, {"image": "0.npy", "text": 5}]
    place = write(tmp_path, rows)
    train, _ = source.build("x", SourceSpec(path=str(place), val=0.0), processor, cache=tmp_path, length=32)
    assert len(train.chunks) == 1 and train.facts["malformed"] == 4
    (line,) = train.report()
    assert "line 2: there is no picture" in line and "holds <image> 2 times" in line
    with pytest.raises(UserError, match="line 2"):
        source.build("x", SourceSpec(path=str(place), val=0.0, bad="fatal"), processor, cache=tmp_path, length=32)


def test_pictures_of_every_form_come_to_one_size(processor, tmp_path, monkeypatch):
    from PIL import Image

    def read(value: Any) -> np.ndarray:
        return images.pixels(value, folder=tmp_path, side=16, processor=processor.image_processor)

    rng = np.random.default_rng(0)
    big, same = rng.integers(0, 256, (40, 30, 3), np.uint8), rng.integers(0, 256, (3, 16, 16), np.uint8)
    Image.fromarray(big).save(tmp_path / "big.png")
    encoded = (tmp_path / "big.png").read_bytes()
    shown = [read(v) for v in ("big.png", encoded, {"bytes": encoded, "path": None}, big, Image.fromarray(big))]
    assert all(np.array_equal(one, shown[0]) for one in shown) and shown[0].shape == (3, 16, 16)
    assert np.array_equal(read(same), same) and np.array_equal(read(same.tolist()), same)
    assert read(big[..., 0]).shape == (3, 16, 16) and read(same.astype(np.float32)).dtype == np.float32
    for wrong, why in (
        (big / 255.0, "of floats"),
        ("none.png", "no picture"),
        (3, "neither"),
        (same.astype(int) * 9, "8 bits"),
    ):
        with pytest.raises(images.Unusable, match=why):
            read(wrong)
    (tmp_path / "broken.jpg").write_bytes(encoded[:50])
    with pytest.raises(images.Unusable, match="decoded"):
        read("broken.jpg")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="package Pillow"):
        read("big.png")


def test_a_changed_picture_is_another_source(tmp_path):
    place = write(tmp_path, [{"image": "0.npy", "text": "a"}])
    spec = SourceSpec(path=str(place))
    before = store.content_id(spec)
    assert store.content_id(spec) == before
    np.save(tmp_path / "0.npy", np.zeros((3, 16, 16), np.uint8))
    assert store.content_id(spec) != before


def test_a_model_and_a_processor_that_differ_are_refused(processor):
    config = {**toy.MODEL, "vision_config": {**toy.MODEL["vision_config"], "patch_size": 4}}
    with pytest.raises(UserError, match="patch is 8 and the model's 4"):
        modality.model(None, config, processor=processor, length=LENGTH)
    with pytest.raises(UserError, match="write `tokenizer"):
        modality.processor({"text": "bytes"}, folder=None, texts=list, cache=Path("none"))
    with pytest.raises(UserError, match="type llava"):
        modality.model(None, {"model_type": "llama"}, processor=processor, length=LENGTH)


def test_a_tokenizer_trained_for_the_stage_holds_the_picture_too(tmp_path):
    spec = SourceSpec(use="tutelage.modalities.pair.toy:Squares", args={"count": 30})
    wanted = {"text": {"train": "bpe", "vocab": 290}, "size": 16, "patch": 8}
    made = modality.processor(wanted, folder=None, texts=lambda: [(spec, None)], cache=tmp_path)
    assert 260 < len(made.tokenizer) <= 290 and made.image_token_id == len(made.tokenizer) - 1
    again = modality.processor(wanted, folder=None, texts=lambda: [(spec, None)], cache=tmp_path)
    assert modality.processor_id(again) == modality.processor_id(made)


def test_a_plan_counts_patches(tmp_path):
    rows = {row["stage"]: row for row in planning.plan(graph(tmp_path))}
    assert not (tmp_path / "runs").exists()
    assert rows["align"]["trained"] < rows["align"]["params"] / 10 and rows["tune"]["trained"] == rows["tune"]["params"]
    run(tmp_path, only="align")
    spec, built = SourceSpec(path=str(tmp_path / "data" / "pairs.jsonl"), val="20%"), graph(tmp_path)
    processor = modality.processor(dict(toy.TOKENIZER), folder=None, texts=list, cache=tmp_path)
    train, _ = source.build("squares", spec, processor, cache=built.runs / ".data", length=LENGTH)
    assert rows["align"]["data"]["squares"]["tokens"] == pytest.approx(train.facts["tokens"], rel=0.1)


def test_memory_counts_what_a_projector_needs_of_frozen_blocks_and_the_vision_tower(processor):
    from tutelage.core.memory import estimate

    with torch.device("meta"):
        model = modality.model(None, dict(toy.MODEL), processor=processor, length=LENGTH)
    whole = estimate(model, batch_rows=4, length=LENGTH)["activations"]
    model.model.vision_tower.requires_grad_(False)
    without = estimate(model, batch_rows=4, length=LENGTH)["activations"]
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    assert 0 < without / 4 < estimate(model, batch_rows=4, length=LENGTH)["activations"] and without < whole
