"""Frozen weights in four bits: what is computed, saved, exported, refused."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.core.tiny import tiny, tokens
from tests.toy import graph, numbers
from tutelage import planning
from tutelage.base.errors import UserError
from tutelage.base.spec import EngineSpec
from tutelage.core import artifact, loop, memory, quantized
from tutelage.core.anatomy import anatomy
from tutelage.core.elsewhere import at_step
from tutelage.core.flops import count
from tutelage.core.graph import Graph
from tutelage.core.run import run_graph
from tutelage.look import digest_of

bitsandbytes = pytest.importorskip("bitsandbytes")


def quantize(model: Any, kind: str | None = "nf4") -> list[str]:
    """As a stage does; the names of what is quantized."""
    stage = SimpleNamespace(engine=EngineSpec(quantize=kind))
    engine = SimpleNamespace(model=model, anatomy=anatomy(model))
    quantized.quantize(SimpleNamespace(node=SimpleNamespace(name="two", stage=stage), engine=engine))
    return [name for name, module in model.named_modules() if isinstance(module, quantized.Linear4bit)]


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokens(name, seed=9)).logits


def over(kind: str | None = "nf4", **more: Any) -> Any:
    """A change of the toy recipe: stage `two` trains an adapter. (Rows of 64, for bitsandbytes' own layer on a CPU.)"""

    def change(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["start"] |= {"hidden_size": 64, "intermediate_size": 128}
        two = recipe["stages"]["two"]
        two |= {"methods": [{"use": "param/lora", "r": 4}], **more}
        two["engine"] = {**two["engine"], "quantize": kind}

    return change


def run(built: Graph, expect: str = "done") -> Any:
    result = run_graph(built, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed, result.failed
    return result


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The toy recipe with an adapter over NF4, run to its end."""
    built = graph(tmp_path_factory.mktemp("nf4"), change=over())
    assert run(built).done == ["one", "two"]
    return built


def home(built: Graph) -> Path:
    found = built.nodes["two"].folder
    assert found is not None
    return found


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "t5", "mixtral"])
def test_a_model_in_four_bits_answers_as_the_weights_these_stand_for(name: str, kind: str) -> None:
    model, plain = tiny(name).requires_grad_(False), logits(tiny(name), name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    names = quantize(model, kind)
    head = anatomy(model).head
    assert names and head not in names
    assert not (name == "t5" and any(each.endswith(".wo") for each in names))
    four = logits(model, name)
    assert (four - plain).abs().max() > 1e-3
    assert quantized.restore(model) and not quantized.restore(model)
    torch.testing.assert_close(logits(model, name), four, rtol=0, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    moved = {key for key in weights if not torch.equal(weights[key], after[key])}
    assert moved == {f"{each}.weight" for each in names}
    # NF4's widest gap is 0.30 of a block's largest weight and FP4's 0.33; half of it, and the scale's own rounding
    for key in moved:
        assert (after[key] - weights[key]).abs().max() < 0.18 * weights[key].abs().max()


def test_gradients_pass_through_four_bits_as_through_the_weights_these_stand_for() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 32).requires_grad_(False)
    model = tiny("llama").requires_grad_(False)
    model.model.layers[0].extra = plain
    quantize(model)
    layer = model.model.layers[0].extra
    x = torch.randn(5, 48, requires_grad=True)
    (given,) = torch.autograd.grad(layer(x).square().sum(), x)
    restored = layer.restored()
    (wanted,) = torch.autograd.grad(restored(x).square().sum(), x)
    torch.testing.assert_close(given, wanted)


def test_the_type_it_computes_in_is_the_stage_s() -> None:
    model = tiny("llama").requires_grad_(False)
    name = quantize(model)[0]
    layer, x = model.get_submodule(name), torch.randn(2, 32)
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_what_is_trained_stays_whole() -> None:
    model = tiny("llama").requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    names = quantize(model)
    assert len(names) == 4 + 4 + 3 and not any("1.mlp" in name for name in names)


def test_four_bits_are_saved_as_they_are_and_read_back_to_the_bit() -> None:
    model, other = tiny("llama").requires_grad_(False), tiny("llama", seed=1).requires_grad_(False)
    names = quantize(model)
    quantize(other)
    saved = artifact.tensors_of(model)
    bytes_held = sum(t.nbytes for key, t in saved.items() if key.rpartition(".")[0] in names)
    whole = sum(math.prod(quantized.sides(model.get_submodule(name))) for name in names)
    assert bytes_held < 0.6 * whole  # of which float32 has 4 each
    mine = artifact.tensors_of(other)
    assert mine.keys() == saved.keys()
    for key, tensor in saved.items():
        mine[key].copy_(tensor)
    assert torch.equal(logits(other, "llama"), logits(model, "llama"))


def test_operations_are_counted_as_of_plain_layers() -> None:
    def work(model: Any) -> int:
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        return count(lambda: model(**tokens("llama"), labels=tokens("llama")["input_ids"]).loss.backward())[1]

    model = tiny("llama", tied=False).requires_grad_(False)
    quantize(model)
    assert work(model) == work(tiny("llama", tied=False))


# -- a stage ----------------------------------------------------------------------------------------------------------


def test_a_cut_stage_ends_in_the_same_bits(done: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = loop.record

    def stopping(at: Any, *args: Any, **kwargs: Any) -> None:
        record(at, *args, **kwargs)
        if at.node.name == "two" and at.clock.step == 7:
            raise loop.Stopped("test")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "record", stopping)
        assert run(graph(tmp_path, change=over())).stopped == ["two"]
    again = graph(tmp_path, change=over())
    assert run(again).done[-1:] == ["two"]
    assert numbers(home(again)) == numbers(home(done))
    assert digest_of(home(again)) == digest_of(home(done))


def test_a_checkpoint_holds_four_bits_and_becomes_a_model_like_the_artifact(done: Graph) -> None:
    step = artifact.states(home(done) / "state")[-1]
    held = artifact.load_tensors(step / "model.safetensors")
    based = {key: t for key, t in held.items() if ".base_layer." in key}
    assert based and all(t.dtype == torch.uint8 for key, t in based.items() if key.endswith(".base_layer.weight"))
    assert not any(t.is_floating_point() and t.ndim > 1 for t in based.values())
    made = artifact.load_tensors(at_step(done.nodes["two"], 12) / "model.safetensors")
    final = artifact.load_tensors(home(done) / "artifact/model/model.safetensors")
    assert made.keys() == final.keys() and all(torch.equal(made[key], final[key]) for key in final)


def test_what_is_exported_opens_in_plain_transformers_and_its_adapter_over_the_same_four_bits(done: Graph) -> None:
    import peft
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_pretrained(home(done) / "artifact/model", dtype=torch.float32).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    base = done.nodes["one"].folder
    assert base is not None
    settings = tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    for config, bound in ((settings, 1e-4), (None, math.inf)):
        four = tf.AutoModelForCausalLM.from_pretrained(
            base / "artifact/model", dtype=torch.float32, quantization_config=config, device_map="cpu"
        )
        # as in training: in evaluation bitsandbytes takes kernels that round to bf16, on processors that have them
        adapted = peft.PeftModel.from_pretrained(four, home(done) / "artifact/adapter").train()
        with torch.no_grad():
            found = adapted(input_ids=ids).logits
        assert bool(torch.isfinite(found).all())
        assert (found - wanted).abs().max() < bound
        if config is None:  # over the base in full precision: near, and not the same
            assert (found - wanted).abs().max() > 1e-3


def test_a_frozen_stage_without_a_wrapper_is_quantized_too(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        two = recipe["stages"]["two"]
        two |= {"train": ["*embed*", "role:norm"]}
        two["engine"] = {**two["engine"], "quantize": "fp4"}

    built = graph(tmp_path, change=change, steps=4)
    run(built)
    start = artifact.load_tensors(tmp_path / "runs/toy/one/1/artifact/model/model.safetensors")
    end = artifact.load_tensors(home(built) / "artifact/model/model.safetensors")
    made = artifact.load_tensors(at_step(built.nodes["two"], 4) / "model.safetensors")
    assert all(torch.equal(made[key], end[key]) for key in end)
    drift = {key: float((end[key] - start[key]).abs().max()) for key in start}
    assert all(drift.values()), "trained, or de-quantized"


def test_the_plan_tells_what_weights_in_four_bits_take(tmp_path: Path) -> None:
    rows, written = {}, {}
    for kind in (None, "nf4"):
        built = graph(tmp_path / str(kind), change=over(kind))
        rows[kind] = {row["stage"]: row for row in planning.plan(built)}["two"]
        run(built)
        written[kind] = sum(path.stat().st_size for path in (home(built) / "state").glob("*/*.safetensors"))
    fewer = rows[None]["disk"]["checkpoints"] - rows["nf4"]["disk"]["checkpoints"]
    assert fewer == pytest.approx(written[None] - written["nf4"], rel=0.05)
    model = tiny("llama").requires_grad_(False)
    whole = memory.estimate(model, batch_rows=2, length=8)["weights"]
    told = memory.estimate(model, batch_rows=2, length=8, quantize=True)["weights"]
    assert whole == sum(p.nbytes for p in model.parameters())
    names = quantize(model)
    held = sum(t.nbytes for t in artifact.tensors_of(model).values()) - 4 * len(names)  # offsets
    assert told == held
    few, many = rows["nf4"]["memory"], rows[None]["memory"]
    assert few["weights"] < 0.6 * many["weights"] and few["activations"] == many["activations"]
    assert rows["nf4"]["flops"] == rows[None]["flops"]


def test_activations_of_a_model_in_four_bits_are_estimated_as_of_the_plain_one() -> None:
    model = tiny("llama").requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    before = memory.estimate(model, batch_rows=4, length=16)
    quantize(model)
    after = memory.estimate(model, batch_rows=4, length=16)
    assert (after["activations"], after["logits"]) == (before["activations"], before["logits"])


# -- refused ----------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, change: Any) -> str:
    with pytest.raises(UserError) as error:
        graph(tmp_path, change=change)
    said = str(error.value)
    assert "\n" not in said and "stages.two.engine.quantize" in said
    return said


def test_training_all_weights_in_four_bits_is_refused(tmp_path: Path) -> None:
    def whole(recipe: dict[str, Any]) -> None:
        recipe["stages"]["two"]["engine"] = {"quantize": "nf4"}

    assert "cannot be trained" in refused(tmp_path, whole)

    def every(recipe: dict[str, Any]) -> None:
        whole(recipe)
        recipe["stages"]["two"]["train"] = ["*"]

    with pytest.raises(UserError, match="every linear layer here is trained"):
        run(graph(tmp_path, change=every))


def test_a_method_that_holds_on_to_whole_weights_is_refused(tmp_path: Path) -> None:
    def both(recipe: dict[str, Any]) -> None:
        over()(recipe)
        recipe["stages"]["two"]["methods"].append("continual/ewc")

    assert "continual/ewc" in refused(tmp_path, both)


def test_a_stage_that_does_not_train_is_refused(tmp_path: Path) -> None:
    def measured(recipe: dict[str, Any]) -> None:
        recipe["stages"]["two"] = {"of": ["one"], "measure": ["probe/bits_per_byte"], "engine": {"quantize": "nf4"}}

    assert "only a stage that trains" in refused(tmp_path, measured)


def test_without_bitsandbytes_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    built = graph(tmp_path, change=over())
    with pytest.raises(UserError, match=r"stages\.two\.engine\.quantize: bitsandbytes is not installed; `pip install"):
        quantized.check_library(built.recipe.stages)
    with pytest.raises(UserError, match="not installed"):
        quantize(tiny("llama").requires_grad_(False))
