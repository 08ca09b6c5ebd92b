"""From "my model and my file" to a run and back to a plain folder, for seven families and all kinds of files."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from tests.recipes import families
from tests.recipes.families import jsonl, sentences
from tutelage import modalities, onboarding, survey, verbs
from tutelage.base import card, load
from tutelage.base.errors import UserError
from tutelage.base.registry import AXES
from tutelage.core.graph import Graph
from tutelage.core.record import read_lines
from tutelage.core.run import run_graph
from tutelage.method_template import KINDS, template, write_method

SLOW = {"mamba"}  # its scan in plain torch takes ten times as long


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.folder("qwen2", tmp_path_factory.mktemp("qwen") / "Qwen-tiny")


@pytest.fixture
def few_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    families.few_passages(monkeypatch, 16)


@pytest.fixture
def no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan has tests of its own, and measures this machine every time."""
    monkeypatch.setattr(onboarding, "_plan", lambda recipe, runs, console: None)


def new(model: Any, data: Any, out: str = "recipe.yaml") -> tuple[dict[str, Any], str, str]:
    """Write a recipe; its stage, its text, and what was said."""
    said = Console(file=io.StringIO(), width=200)
    onboarding.write_recipe(str(model), str(data), out=Path(out), runs=Path("runs"), console=said)
    text = Path(out).read_text(encoding="utf-8")
    return yaml.safe_load(text)["stages"]["domain"], text, said.file.getvalue()  # type: ignore[attr-defined]


def run(recipe: str, *sets: str) -> list[dict[str, Any]]:
    """Run a recipe in this process; the measurements of its stage."""
    loaded = load.load(Path(recipe), sets=["stages.domain.evals.final=8", "stages.domain.evals.passages=4", *sets])
    made = Graph.resolve(loaded, name=Path(recipe).stem, modality=modalities.find("text"), runs=Path("runs"))
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed
    return [
        row for row in read_lines(Path("runs") / Path(recipe).stem / "domain/1/metrics.jsonl") if row["kind"] == "eval"
    ]


# -- seven families ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f in SLOW)) for f in families.FAMILIES])
def test_a_model_and_a_file_become_a_run_and_a_plain_folder_again(family: str, here: Path, few_passages: None) -> None:
    families.folder(family, here / "model")
    jsonl(here / "notes.jsonl", [{"text": text} for text in sentences(300, seed=3)])
    stage, _, said = new("model", "notes.jsonl")
    assert stage["start"] == "./model" and stage["keep"] == "self" and stage["data"]["notes"]["field"] == "text"
    assert "300 records" in said and "tutelage run recipe.yaml" in said
    evals = run("recipe.yaml", "stages.domain.until=3step")
    assert {"bits_per_byte/notes", "bits_per_byte/self", "kl/self", "forgetting/self"} <= set(evals[-1]["values"])
    assert evals[0]["values"]["kl/self"] == pytest.approx(0, abs=1e-6), "at the start nothing is lost"
    assert evals[-1]["values"]["kl/self"] > 1e-7, "something was learned"
    verbs.export_model("recipe/domain", here / "out", dtype=None, step=None, runs=Path("runs"))
    ours = modalities.find("text").model(
        *modalities.find("text").start_files("runs/recipe/domain/1/artifact/model"),
        processor=families.tokenizer(family),
        length=64,
    )
    theirs = families.opened(here / "out", family)
    ids = torch.randint(5, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    assert families.logits(theirs, ids, family).equal(families.logits(ours.eval(), ids, family))
    assert not families.logits(theirs, ids, family).equal(
        families.logits(families.opened(here / "model", family), ids, family)
    )
    import transformers

    said_again = transformers.AutoTokenizer.from_pretrained(here / "out")("river stone")["input_ids"]
    assert said_again == families.tokenizer(family)("river stone")["input_ids"]


# -- all kinds of data ------------------------------------------------------------------------------------------------

LANGUAGES = [
    "Der Fluss fließt langsam durch das Tal und weiter zum Meer.", "Река медленно течёт через долину к морю.",
    "河水缓缓流过山谷，流向大海。", "يجري النهر ببطء عبر الوادي نحو البحر.", "नदी धीरे-धीरे घाटी से होकर समुद्र की ओर बहती है।",
    "강은 천천히 골짜기를 지나 바다로 흐른다.", "แม่น้ำไหลช้าๆ ผ่านหุบเขาไปยังทะเล", "🌊🏔️ → 🌅",
]  # fmt: skip


def chats(count: int) -> list[dict[str, Any]]:
    pairs = zip(sentences(count, seed=5), sentences(count, seed=6), strict=True)
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]


def kinds() -> dict[str, list[Any]]:
    plain = [{"text": text, "id": i} for i, text in enumerate(sentences(200, seed=3))]
    pairs = zip(sentences(200, seed=5), sentences(200, seed=6), strict=True)
    return {
        "plain": plain,
        "other_field": [{"body": row["text"], "title": "a"} for row in plain],
        "chat": chats(200),
        "pairs": [{"prompt": q, "completion": a} for q, a in pairs],
        "languages": [{"text": f"{i}: {text}"} for i in range(30) for text in LANGUAGES],
        "broken": [*plain[:100], "{not json", "", '{"text": 3}', '["a"]', *plain[100:]],
        "one": plain[:1],
    }


@pytest.mark.parametrize("kind", list(kinds()))
def test_every_kind_of_records_runs(kind: str, here: Path, qwen: Path, few_passages: None, no_plan: None) -> None:
    jsonl(here / f"{kind}.jsonl", kinds()[kind])
    stage, text, said = new(qwen, f"{kind}.jsonl")
    source = stage["data"][kind]
    if kind in ("chat", "pairs"):
        assert source["template"] == "chat" and stage["objective"] == "align/sft" and "field" not in source
    else:
        assert source["field"] == ("body" if kind == "other_field" else "text") and "objective" not in stage
    assert ("malformed" in text) == (kind == "broken") == ("3 malformed records" in said)
    if kind == "broken":
        assert "broken.jsonl line 101: not JSON" in " ".join(text.replace("#", "").split())
    assert "numbers measured on so little will be rough" in said
    assert f"bits_per_byte/{kind}" in run("recipe.yaml", "stages.domain.until=2step")[-1]["values"]


def test_other_places_of_data_are_read_too(here: Path, qwen: Path, no_plan: None) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = sentences(120, seed=3)
    (here / "a.csv").write_text("title,text\n" + "".join(f"t,{text}\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), here / "a.parquet")
    (here / "book.txt").write_text("\n".join(texts))
    (here / "folder").mkdir()
    for i in range(3):
        (here / f"folder/{i}.txt").write_text("\n".join(texts[i::3]))
        jsonl(here / f"part-{i}.jsonl", [{"text": text} for text in texts[i::3]])
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(here / "saved"))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(str(here / "both"))
    wanted = {
        "a.csv": ("a", "120 records"), "a.parquet": ("a", "120 records"), "book.txt": ("book", "1 document;"),
        "folder": ("folder", "3 documents"), "part-*.jsonl": ("mine", "120 records"), "saved": ("saved", "120 records"),
        "both": ("both", "120 records"), str(here / "a.csv"): ("a", "120 records"),
    }  # fmt: skip
    for i, (data, (name, held)) in enumerate(wanted.items()):
        stage, text, _ = new(qwen, data, out=f"r{i}.yaml")
        assert stage["data"][name]["path"] == data
        assert held in text, text
        assert ("field" in stage["data"][name]) == (name not in ("book", "folder"))


def test_data_of_no_use_is_one_clear_line(here: Path, qwen: Path, no_plan: None) -> None:
    (here / "empty.jsonl").write_text("")
    (here / "blank.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    (here / "binary.jsonl").write_bytes(bytes(range(256)) * 8)
    (here / "binary.txt").write_bytes(bytes(range(256)) * 8)
    (here / "broken.jsonl").write_text("{no\n{no\n")
    (here / "numbers.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    (here / "bare").mkdir()
    for name, why in {
        "empty.jsonl": "it is empty", "blank.jsonl": "all its records are empty", "binary.jsonl": "binary",
        "binary.txt": "not UTF-8|binary", "broken.jsonl": "not JSON", "numbers.jsonl": "no field .* holds text",
        "absent.jsonl": "no such file", "bare": "holds no text", "*.parquet": "matches no file",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=why) as caught:
            new(qwen, name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not Path("recipe.yaml").exists()


# -- models and choices -----------------------------------------------------------------------------------------------


def test_nothing_is_written_over(here: Path, qwen: Path) -> None:
    Path("recipe.yaml").write_text("mine")
    with pytest.raises(UserError, match="already"):
        new(qwen, "absent.jsonl")
    assert Path("recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"hiden_size": 32}, "a llama config has no 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": "32"}, "expected int, got str"),
        ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
        ({"hidden_act": "gelux"}, "cannot build a llama of this config: KeyError: 'gelux'"),
        ({"model_type": "vit"}, "no language model of type vit"),
        ("{", "wrong.json:1: not JSON"),
    ],
    ids=["misspelled", "kind", "value", "name", "no-language-model", "cut"],
)
def test_a_wrong_config_is_one_line(written: Any, says: str, here: Path) -> None:
    good = {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    text = written if isinstance(written, str) else json.dumps({**good, **written})
    (here / "wrong.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        survey.look_at_model("wrong.json")
    assert "\n" not in str(error.value)


def test_a_models_own_config_file_is_a_config(here: Path) -> None:
    """As transformers writes it: with numbers such as 1e-05, which YAML 1.1 takes for text."""
    families.folder("gpt2", here / "gpt2")
    assert "1e-05" in (here / "gpt2/config.json").read_text()
    found = survey.look_at_model("gpt2/config.json")
    assert found.folder is None and found.config["layer_norm_epsilon"] == 1e-5


def test_a_config_makes_fresh_weights_with_a_tokenizer_of_the_datas_own(here: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    jsonl(here / "x.jsonl", [{"text": text} for text in sentences(200)])
    stage, _, said = new("tiny.yaml", "x.jsonl")
    assert stage["tokenizer"] == {"train": "bpe", "vocab": 1024} and "fresh weights" in said
    assert "keep" not in stage and "methods" not in stage and float(stage["optim"]["lr"]) == 3e-3
    assert "bits_per_byte/x" in run("recipe.yaml", "stages.domain.until=2step")[-1]["values"]


def test_a_model_that_cannot_be_opened_is_one_clear_line(here: Path, qwen: Path) -> None:
    jsonl(here / "x.jsonl", [{"text": "a"}])
    (here / "bare").mkdir()
    (here / "bare/config.json").write_text((qwen / "config.json").read_text())
    (here / "bare/model.safetensors").write_bytes((qwen / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="trained weights need the tokenizer"):
        new("bare", "x.jsonl")
    (here / "no").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        new("no", "x.jsonl")


def test_names_and_paths_that_mean_something_else_are_spelled_out(here: Path, qwen: Path, no_plan: None) -> None:
    (here / "domain").symlink_to(qwen)  # a folder that is called like the stage
    jsonl(here / "self.jsonl", [{"text": text} for text in sentences(100)])
    jsonl(here / "with, comma: and #.jsonl", [{"text": text} for text in sentences(100)])
    stage, _, _ = new("domain", "self.jsonl")
    assert stage["start"] == "./domain" and list(stage["data"]) == ["my_self"]
    stage, _, _ = new("domain", "with, comma: and #.jsonl", out="other.yaml")
    assert next(iter(stage["data"].values()))["path"] == "with, comma: and #.jsonl"
    for path, name in {"true.jsonl": "my_true", "2024.csv": "my_2024", "data/*.jsonl": "data", "*.jsonl": "mine",
                       "über uns.txt": "über_uns", "x.jsonl.gz": "x"}.items():  # fmt: skip
        assert survey.name_of(path) == name


def test_lora_is_switched_on_where_full_training_does_not_fit(
    here: Path, qwen: Path, no_plan: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(here / "x.jsonl", [{"text": text} for text in sentences(200)])
    full = survey.room(survey.look_at_model(str(qwen)), 64)
    monkeypatch.setattr(survey.memory, "available", lambda device: (full.full + full.lora) // 2 * 10 // 9)
    stage, text, _ = new(qwen, "x.jsonl")
    assert stage["methods"][1]["use"] == "param/lora" and float(stage["optim"]["lr"]) == 2e-4
    assert "all weights would take" in text
    monkeypatch.setattr(survey.memory, "available", lambda device: full.lora // 2)
    stage, _, said = new(qwen, "x.jsonl", out="less.yaml")
    assert "even with LoRA" in said


@pytest.mark.parametrize(
    ("most", "context", "length"),
    [
        (10, 1024, 64),
        (64, 1024, 64),
        (65, 1024, 128),
        (5000, 1024, 1024),
        (9000, None, 4096),
        (900, 514, 512),
        (50, 40, 40),
    ],
)
def test_length_is_a_power_of_two_that_the_model_has_room_for(most: int, context: int | None, length: int) -> None:
    assert onboarding.length_for(most, context) == length


def test_shares_and_batches_follow_the_amount_of_data() -> None:
    for passages in (1, 40, 500, 1200, 4000, 30_000, 1e6, 1e8):
        share = onboarding.val_for(passages)
        assert 0.1 <= share <= 5
        assert passages * share / 100 >= min(50, 0.05 * passages)
    for rows in (300, 1000, 12_345, 1e5):
        assert 50 <= rows / onboarding.rows_for(rows, 64) <= 110
    assert onboarding.rows_for(10, 512) == 4 and onboarding.rows_for(1e9, 2048) == 64


# -- new method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_has_a_template_that_imports_and_owns_to_its_gaps(axis: str, here: Path) -> None:
    (here / "tutelage/methods").mkdir(parents=True)
    write_method(f"{axis}/brand_new", console=Console(file=io.StringIO()))
    path = here / f"tutelage/methods/{axis}/brand_new.py"
    text = path.read_text()
    gaps = card.lint(path)
    assert len(gaps) == text.count(card.GAP) - text.count(f'off["{card.GAP}') > 8
    assert not [gap for gap in gaps if "still to fill in" not in gap], "its structure is whole"
    space: dict[str, Any] = {"__name__": "brand_new"}
    exec(compile(ast.parse(text), "brand_new", "exec"), space)
    made = space["BrandNew"]()
    assert set(KINDS[axis].hooks) <= set(made.hooks())
    assert (made.off is None) != (made.no_off is None)
    with pytest.raises((NotImplementedError, KeyError)):
        space["holds"]({}, {})
    with pytest.raises(NotImplementedError):
        space["effect"](None)


def test_a_template_that_is_filled_in_passes_the_lint(here: Path) -> None:
    path = Path("done.py")
    path.write_text(re.sub(rf"{card.GAP} ?", "", template(KINDS["continual"], "Done", use="done:Done")).replace(
        '"""title: what it does, in one sentence.', '"""Done: it is done.'
    ))  # fmt: skip
    assert card.lint(path) == []


def test_a_new_method_outside_a_checkout_is_ones_own_file(here: Path) -> None:
    said = io.StringIO()
    write_method("continual/anchor", console=Console(file=said, width=200))
    assert Path("anchor.py").exists() and "anchor:Anchor" in said.getvalue() and "this folder" in said.getvalue()
    for name, why in {"continual/anchor": "already", "continual/ewc": "already", "continuel/x": "did you mean 'continual'",
                      "anchor": "axis/name", "continual/Big": "small letters"}.items():  # fmt: skip
        with pytest.raises(UserError, match=why):
            write_method(name, console=Console(file=io.StringIO()))


def test_the_recipe_is_json_safe_whatever_the_text(here: Path, qwen: Path, no_plan: None) -> None:
    """What was found in the data is said in comments; none of it may break out of them."""
    rows = [{'te"xt: {#\n': text} for text in sentences(80)]
    jsonl(here / "x.jsonl", rows)
    stage, text, _ = new(qwen, "x.jsonl")
    assert stage["data"]["x"]["field"] == 'te"xt: {#\n' and json.dumps(stage)
    assert all(line.lstrip().startswith(("#", "-")) or ":" in line for line in text.splitlines())
    jsonl(
        here / "y.jsonl",
        [*rows[:20], *({"a\x00b": "…", 'te"xt: {#\n': "\u2028\x07\x85"} for _ in range(20)), "{\x1b[31m"],
    )
    new(qwen, "y.jsonl", out="y.yaml")
