"""The divergence from the start: zero where nothing has moved, the formula's gradient where it has."""

import pytest
import torch

from tests.core.tiny import CONFIGS, tiny
from tests.methods.small import batch_of, view_of
from tutelage.base.errors import UserError
from tutelage.core.types import IGNORE
from tutelage.methods.continual.lwf import LwF
from tutelage.methods.objective.causal_lm import CausalLM
from tutelage.methods.objective.masked_lm import MaskedLM
from tutelage.methods.objective.prefix_lm import PrefixLM

TEXTS = ["the new text", "日本語の文"]


def moved(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize(("name", "objective"), [("gpt2", CausalLM()), ("bert", MaskedLM()), ("t5", PrefixLM())])
def test_it_is_zero_at_the_start_and_counts_as_the_objective_does(name, objective):
    view = view_of(name, objective=objective)
    batch = view.prepared(batch_of(TEXTS))
    out = view.engine.out(batch)
    found = LwF().auxiliary(out, batch, view)
    assert float(found.total) == pytest.approx(0, abs=1e-5)
    assert float(found.weight) == float(objective.loss(view.engine.out, batch, view).weight)
    moved(view.engine.model)
    assert float(LwF().auxiliary(view.engine.out(batch), batch, view).total) > 0.01


def test_value_and_gradient_are_the_formulas():
    view = view_of(objective=CausalLM())
    moved(view.engine.model)
    batch = batch_of(TEXTS)
    method = LwF(strength=0.7, temperature=2.0)
    params = list(view.engine.params.values())
    ours = method.auxiliary(view.engine.out(batch), batch, view).total
    grads = torch.autograd.grad(ours, params, allow_unused=True)
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["segments"]}
    keep = batch["labels"] != IGNORE
    now = (view.engine.model(**inputs).logits / 2).log_softmax(-1)[keep]
    with torch.no_grad():
        then = (tiny("gpt2").eval()(**inputs).logits / 2).log_softmax(-1)[keep]
    by_hand = 0.7 * 4 * (then.exp() * (then - now)).sum()
    torch.testing.assert_close(ours, by_hand)
    for one, other in zip(grads, torch.autograd.grad(by_hand, params, allow_unused=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_quarter_at_temperature_two_pulls_as_the_papers_loss_with_a_weight_of_one():
    view = view_of(objective=CausalLM())
    moved(view.engine.model)
    batch = batch_of(TEXTS)
    params = list(view.engine.params.values())
    ours = LwF(strength=0.25, temperature=2.0).auxiliary(view.engine.out(batch), batch, view).total
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["segments"]}
    keep = batch["labels"] != IGNORE
    with torch.no_grad():
        then = tiny("gpt2").eval()(**inputs).logits.softmax(-1)[keep].sqrt()
    targets = then / then.sum(-1, keepdim=True)  # recorded probabilities to the power of 1/T, over their sum
    papers = -(targets * (view.engine.model(**inputs).logits / 2).log_softmax(-1)[keep]).sum()
    found, wanted = (torch.autograd.grad(loss, params, allow_unused=True) for loss in (ours, papers))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_row_weights_multiply_it():
    view = view_of(objective=CausalLM())
    moved(view.engine.model)
    batch, first = batch_of(TEXTS), batch_of(TEXTS[:1])
    doubled = type(batch)(batch.fields, batch.rows, torch.tensor([2.0, 0.0]), batch.meta)
    one = LwF().auxiliary(view.engine.out(first), first, view)
    two = LwF().auxiliary(view.engine.out(doubled), doubled, view)
    torch.testing.assert_close(two.total, 2 * one.total)
    assert float(two.weight) == 2 * float(one.weight)


def test_a_start_with_other_tokens_is_refused_before_the_first_step():
    view = view_of(objective=CausalLM())
    view._sample = lambda rows: batch_of(TEXTS[:rows])
    LwF().begin(view.engine.model, view)
    config = CONFIGS["gpt2"]()
    config.vocab_size = 311
    other = type(tiny("gpt2"))(config).eval()
    view._refs = {"start": other}
    with pytest.raises(UserError, match="same vocabulary: 307 tokens now, 311 at the start"):
        LwF().begin(view.engine.model, view)


def test_strength_zero_is_off():
    assert LwF(strength=0).is_off() and not LwF().is_off()
