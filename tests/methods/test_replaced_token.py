"""Replaced token detection beside ELECTRA's formulas: what is drawn, what counts as replaced, whose gradient goes where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors import safe_open

from tests.core.tiny import CONTEXT, VOCAB, tiny
from tests.methods.small import SPECIAL, batch_of, encode, view_of
from tests.toy import graph
from tutelage.base.errors import UserError
from tutelage.core.run import run_graph
from tutelage.core.types import IGNORE
from tutelage.methods.objective.replaced_token import ReplacedToken, narrowed, sampled
from tutelage.methods.probe.bits_per_byte import BitsPerByte
from tutelage.methods.probe.loss import Loss
from tutelage.modalities.text import toy

TEXTS = ["the quick brown fox jumps over the lazy dog", "a stitch in time saves nine", "no news is good news, they say"]


def made(model: Any = None, **settings: Any) -> tuple[ReplacedToken, Any]:
    """The method with its parts, on a view of a tiny model."""
    method = ReplacedToken(**settings)
    view = view_of("bert", objective=method, columns={"held": TEXTS}, model=model)
    torch.manual_seed(0)
    method.modules(view.engine.model)
    return method, view


def both(method: ReplacedToken) -> tuple[Any, Any]:
    assert method._generator is not None and method._detector is not None
    return method._generator, method._detector


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    chance = (torch.arange(40_000) + 0.5) / 40_000  # every number equally often
    drawn = sampled(logits.expand(len(chance), -1), chance)
    shares = torch.bincount(drawn, minlength=4) / len(chance)
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=1e-4, rtol=0)
    assert sampled(torch.tensor([[-torch.inf, 0.0, 0.0]]), torch.tensor([0.0])).tolist() == [1]
    assert sampled(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1.0 - 2**-24])).tolist() == [0]
    assert sampled(torch.zeros(0, 5), torch.zeros(0)).tolist() == []


def test_the_generator_sees_masks_and_the_model_sees_what_it_fills_in() -> None:
    method, view = made(rate=0.3)
    seen: dict[str, torch.Tensor] = {}
    generator, _ = both(method)
    generator.body.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(generator=kwargs["input_ids"]), with_kwargs=True
    )

    def model(batch: Any) -> Any:
        seen["model"] = batch["tokens"]
        return view.engine.out(batch)

    plain = batch_of(TEXTS)
    batch = method.batch(plain, view)
    found = method.found(model, batch, view)
    hidden = batch["labels"] != IGNORE
    masks = seen["generator"] == SPECIAL["mask"]
    assert masks.any() and bool((masks <= hidden).all())
    assert torch.equal(seen["generator"][~masks], plain["tokens"][~masks]), (
        "a hidden token is masked or left, never random"
    )
    assert not (seen["model"] == SPECIAL["mask"]).any() or found.replaced_BT[seen["model"] == SPECIAL["mask"]].all()
    assert torch.equal(seen["model"][~hidden], plain["tokens"][~hidden])
    assert torch.equal(found.replaced_BT, seen["model"] != plain["tokens"]) and found.replaced_BT.any()
    assert torch.equal(found.real_BT, plain["segments"] > 0)


def test_a_token_that_was_guessed_right_counts_as_original() -> None:
    method, view = made(rate=1.0)
    generator, _ = both(method)
    a = encode("a")[1]
    with torch.no_grad():
        generator.bias[a] = 1e4  # it always says a
    found = method.found(view.engine.out, method.batch(batch_of(["aaaa", "abab"]), view), view)
    assert found.replaced_BT.int().tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 0, 1]]


def test_masks_have_electra_s_shares() -> None:
    method, view = made()
    text = "".join(chr(97 + i % 26) for i in range(CONTEXT - 1))
    batch = method.batch(batch_of([text] * 300), view)
    chosen = batch["labels"] != IGNORE
    assert float(chosen[:, 1:].float().mean()) == pytest.approx(0.15, abs=0.01) and not chosen[:, 0].any()
    assert float((batch["tokens"] == SPECIAL["mask"])[chosen].float().mean()) == pytest.approx(0.85, abs=0.02)


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_electra_s_over_any_division_into_micro_batches() -> None:
    """Mean cross-entropy of the hidden tokens + λ · mean binary cross-entropy of all tokens that are no padding."""
    method, view = made(rate=0.3, detection=50.0)
    batch = method.batch(batch_of(TEXTS), view)
    found = method.found(view.engine.out, batch, view)
    real = batch["segments"] > 0
    detection = F.binary_cross_entropy_with_logits(found.logits_BT[real], found.replaced_BT[real].float())
    wanted = found.nll_N.mean() + 50 * detection
    whole = method.loss(view.engine.out, batch, view)
    torch.testing.assert_close(whole.total / whole.weight, wanted)
    assert float(whole.weight) == int(real.sum())
    parts = [method.loss(view.engine.out, micro, view) for micro in batch.split(1)]
    together = sum(float(part.total.detach()) for part in parts) / sum(float(part.weight) for part in parts)
    assert together == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_a_row_s_weight_multiplies_both_parts() -> None:
    method, view = made(rate=0.3)
    batch = method.batch(batch_of(TEXTS[:2]), view)
    twice = batch.weighted(torch.tensor([2.0, 0.0]))
    one = next(batch.split(1))
    heavy, plain = (method.loss(view.engine.out, some, view) for some in (twice, one))
    torch.testing.assert_close(heavy.total, 2 * plain.total)
    assert float(heavy.weight) == 2 * float(plain.weight)


def test_no_gradient_of_detection_reaches_the_generator_and_none_of_filling_in_the_model_s_blocks() -> None:
    method, view = made(rate=0.3)
    generator, detector = both(method)
    model, batch = view.engine.model, method.batch(batch_of(TEXTS), view)
    found = method.found(view.engine.out, batch, view)
    blocks = [p for n, p in model.named_parameters() if "encoder" in n]
    table = model.get_input_embeddings().weight
    mine = [p for p in generator.parameters() if p.requires_grad]

    def reached(value: torch.Tensor, parts: list[Any]) -> bool:
        grads = torch.autograd.grad(value, parts, allow_unused=True, retain_graph=True)
        return any(g is not None and bool(g.abs().sum() > 0) for g in grads)

    detecting, filling = found.logits_BT.sum(), found.nll_N.sum()
    assert reached(filling, mine) and not reached(detecting, mine)
    assert reached(detecting, blocks) and not reached(filling, blocks)
    assert reached(detecting, list(detector.parameters()))
    where = model.bert.embeddings.position_embeddings.weight
    for part in (table, where):
        assert reached(filling, [part]) and reached(detecting, [part]), "the embeddings are shared"


def test_every_part_of_the_generator_learns_and_none_of_it_is_the_model_s() -> None:
    method, view = made(rate=0.3)
    generator, detector = both(method)
    loss = method.loss(view.engine.out, method.batch(batch_of(TEXTS), view), view)
    loss.total.backward()
    for part in (generator, detector):
        assert [name for name, p in part.named_parameters() if p.grad is None] == []
    own = {id(p) for p in view.engine.model.parameters()}
    assert not own & {id(p) for p in generator.parameters()}
    frozen = method.freeze({name for name, _ in view.engine.model.named_parameters()}, view)
    assert frozen == {name for name, p in view.engine.model.named_parameters() if name.startswith("cls.")} != set()
    assert all(p.grad is not None for name, p in view.engine.model.named_parameters() if name not in frozen)


# -- the generator ----------------------------------------------------------------------------------------------------


def test_a_generator_is_narrower_and_its_heads_stay_as_wide() -> None:
    config = tf.BertConfig(hidden_size=256, num_attention_heads=4, intermediate_size=1024, num_hidden_layers=12)
    small = narrowed(config, width=0.25, depth=1.0)
    assert (small.hidden_size, small.num_attention_heads, small.intermediate_size) == (64, 1, 256)
    third = narrowed(config, width=1 / 3, depth=0.5)
    assert (third.hidden_size, third.num_attention_heads, third.num_hidden_layers) == (85, 1, 6)
    assert config.hidden_size == 256


_SMALL = {"vocab_size": VOCAB, "pad_token_id": 0}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "roberta": lambda: tf.RobertaConfig(**_SMALL, **_SIZES, max_position_embeddings=80),
    "electra": lambda: tf.ElectraConfig(**_SMALL, **_SIZES, embedding_size=16),
    "distilbert": lambda: tf.DistilBertConfig(**_SMALL, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "albert": lambda: tf.AlbertConfig(**_SMALL, **_SIZES, embedding_size=16),
    "deberta-v2": lambda: tf.DebertaV2Config(**_SMALL, **_SIZES, relative_attention=True),
    "modernbert": lambda: tf.ModernBertConfig(**_SMALL, **_SIZES),
    "longformer": lambda: tf.LongformerConfig(**_SMALL, **_SIZES, attention_window=[8, 8], max_position_embeddings=80),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_works_on_the_families_of_its_card(family: str) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForMaskedLM.from_config(FAMILIES[family]())
    method, view = made(model, rate=0.3)
    before = model.get_input_embeddings().weight.detach().clone()
    loss = method.loss(view.engine.out, method.batch(batch_of(TEXTS), view), view)
    (loss.total / loss.weight).backward()
    generator, detector = both(method)
    idle = ("rel_embeddings", "_global.")  # what these families do not use by themselves
    for part in (generator, detector):
        assert [n for n, p in part.named_parameters() if p.grad is None and not any(i in n for i in idle)] == []
    assert model.get_input_embeddings().weight.grad is not None
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_models_that_share_no_embeddings_are_refused() -> None:
    for name in ("llama", "t5", "gpt2"):
        with pytest.raises(UserError, match="no masked model whose embeddings"):
            ReplacedToken().modules(tiny(name))
    method, view = made()
    batch = batch_of(TEXTS)
    batch.meta["special"] = {k: v for k, v in SPECIAL.items() if k != "mask"}
    with pytest.raises(UserError, match="objective/replaced_token needs a tokenizer with a mask token"):
        method.batch(batch, view)


# -- what is measured, what goes out ----------------------------------------------------------------------------------


def test_a_measured_row_is_treated_alike_and_has_no_bytes() -> None:
    method, view = made()
    alone, together = method.measured(batch_of(TEXTS[1:2]), view), method.measured(batch_of(TEXTS), view)
    width = alone["tokens"].shape[1]
    for name in ("tokens", "labels", "original", "chance"):
        assert torch.equal(alone[name][0], together[name][1, :width])
    assert "bytes" not in together and view.prepared(together) is together
    found = BitsPerByte().measure(view.engine.model, view)
    assert list(found) == ["unmeasured/held"] and "predicts no text" in str(found["unmeasured/held"])


def test_detection_is_measured_in_evaluation_mode() -> None:
    method, view = made(rate=0.3)
    found = Loss().measure(view.engine.model, view)
    assert set(found) == {f"{n}/held" for n in ("loss", "detection", "accuracy", "replaced", "recall", "generator")}
    assert found["loss/held"] == pytest.approx(50 * found["detection/held"] + found["generator/held"], rel=0.05)
    assert 0 < found["replaced/held"] < 0.4 and 0 <= found["recall/held"] <= 1
    assert Loss().measure(view.engine.model, view) == found and view.engine.model.training
    generator, detector = both(method)
    assert not generator.training and not detector.training
    alone = ReplacedToken()
    with pytest.raises(UserError, match="only a stage that trains"):
        alone.found(view.engine.out, alone.measured(batch_of(TEXTS), view), view)


WINDOWED = {"model_type": "longformer", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "attention_window": [8, 8], "max_position_embeddings": 512}  # fmt: skip


@pytest.mark.parametrize(("start", "cls"), [(toy.MODELS["bert"], tf.BertModel), (WINDOWED, tf.LongformerModel)])
def test_the_encoder_opens_in_transformers_with_the_detector_beside_it(tmp_path: Path, start: Any, cls: type) -> None:
    def change(recipe: dict[str, Any]) -> None:
        one = recipe["stages"]["one"]
        one |= {"start": start, "objective": {"use": "objective/replaced_token", "width": 0.5}, "until": "3step"}
        one["evals"]["run"] = ["probe/loss"]
        recipe["stages"]["two"] |= {"objective": "objective/masked_lm", "until": "1step"}

    made = graph(tmp_path, model="bert", change=change)
    run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    folder = made.nodes["one"].artifact
    model, told = tf.AutoModel.from_pretrained(folder / "model", add_pooling_layer=False, output_loading_info=True)
    assert not told["missing_keys"] and type(model) is cls
    with safe_open(str(folder / "extra.safetensors"), framework="pt") as file:
        assert sorted(file.keys()) == [f"discriminator.{p}.{w}" for p in ("dense", "out") for w in ("bias", "weight")]
    assert made.nodes["two"].artifact.exists()
