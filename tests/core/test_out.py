"""Chunked logits are the model's own, and their gradients those of whole logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.core.tiny import CONFIGS, NAMES, VOCAB, tiny, tokens
from tutelage.base.errors import UserError
from tutelage.core.anatomy import anatomy
from tutelage.core.out import cross_entropy, forward, js, kl, token_logprob, token_nll
from tutelage.core.types import IGNORE

FEW = 5 * VOCAB  # five positions a chunk


def called(model, inputs, **kwargs):
    return forward(model, inputs, anatomy=anatomy(model), **kwargs)


def labels_for(out, seed=1):
    labels = torch.randint(0, VOCAB, out.shape, generator=torch.Generator().manual_seed(seed))
    labels[:, ::3] = IGNORE
    return labels


def grads_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1.0, other[name].abs().max().item())
        assert (one[name] - other[name]).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_chunked_logits_are_the_models_own(name, tied):
    model, inputs = tiny(name, tied=tied), tokens(name)
    whole = model(**inputs).logits.flatten(0, 1)
    out = called(model, inputs)
    ((one,),) = out.chunks()
    assert (one - whole).abs().max() <= 2e-6  # the same kernel on most processors, but not on all
    many = [logits for (logits,) in out.chunks(budget=FEW)]
    assert len(many) > 4
    assert (torch.cat(many) - whole).abs().max() <= 1e-5
    assert "_compiled_call_impl" not in vars(anatomy(model).backbone)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_whole_logits(name, tied):
    model, inputs = tiny(name, tied=tied), tokens(name)
    logits = model(**inputs).logits
    labels = labels_for(called(model, inputs))
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    plain = grads_of(model)
    for budget in (None, FEW):
        cross_entropy(called(model, inputs), labels, budget=budget).total.backward()
        assert_close(grads_of(model), plain)
    out = called(model, inputs)
    token_logprob(out, labels, budget=FEW).sum().neg().backward()
    assert_close(grads_of(model), plain)


@pytest.mark.parametrize("name", ["llama", "bert", "gemma2"])
def test_two_losses_of_one_output_add_up(name):
    model, reference, inputs = tiny(name), tiny(name, seed=1), tokens(name)
    labels = labels_for(called(model, inputs))
    with torch.no_grad():
        theirs = reference(**inputs).logits.flatten(0, 1)
        ref = called(reference, inputs)
    ours = model(**inputs).logits.flatten(0, 1)
    loss = F.cross_entropy(ours, labels.flatten(), reduction="sum")
    loss = loss + 0.5 * F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)
    loss.backward()
    plain = grads_of(model)
    out = called(model, inputs)
    total = cross_entropy(out, labels, budget=FEW).total + 0.5 * kl(out, ref, budget=FEW).total
    assert torch.allclose(total, loss, rtol=1e-5)
    total.backward()
    assert_close(grads_of(model), plain)
    assert all(p.grad is None for p in reference.parameters())


def test_hidden_states_get_their_gradient_where_positions_count():
    model, inputs = tiny("llama"), tokens("llama")
    out = called(model, inputs)
    labels = labels_for(out)
    out.hidden_BTD.retain_grad()
    cross_entropy(out, labels, budget=FEW).total.backward()
    assert (out.hidden_BTD.grad[labels == IGNORE] == 0).all()
    assert (out.hidden_BTD.grad[labels != IGNORE].abs().sum(-1) > 0).all()


def test_ignored_positions_never_reach_the_head():
    model, inputs = tiny("llama"), tokens("llama")
    out, seen = called(model, inputs), []
    model.lm_head.register_forward_hook(lambda _module, args, _result: seen.append(args[0].shape[1]))
    labels = labels_for(out)
    loss = cross_entropy(out, labels)
    assert seen == [int((labels != IGNORE).sum())] == [int(loss.weight)]


def test_weights_multiply_positions():
    model, inputs = tiny("llama"), tokens("llama")
    out = called(model, inputs)
    labels = labels_for(out)
    weight = torch.rand(out.shape)
    weight[0] = 0
    counts = labels != IGNORE
    for budget in (None, FEW):
        loss = cross_entropy(out, labels, weight, budget=budget)
        assert torch.allclose(loss.total, (token_nll(out, labels) * weight).sum(), rtol=1e-5)
        assert torch.allclose(loss.weight, weight[counts].sum())
    ones = cross_entropy(out, labels, torch.ones(out.shape))
    assert torch.allclose(ones.total, cross_entropy(out, labels).total)


@settings(max_examples=15, deadline=None)
@given(budget=st.integers(1, 40 * VOCAB), seed=st.integers(0, 5))
def test_the_size_of_chunks_does_not_change_the_sum(budget, seed):
    model, inputs = tiny("qwen2"), tokens("qwen2", seed=seed)
    out = called(model, inputs)
    labels = labels_for(out, seed)
    assert torch.allclose(cross_entropy(out, labels, budget=budget).total, cross_entropy(out, labels).total, rtol=1e-5)


def test_nothing_to_learn_is_zero_with_a_gradient_of_zero():
    model, inputs = tiny("llama"), tokens("llama")
    out = called(model, inputs)
    loss = cross_entropy(out, torch.full(out.shape, IGNORE))
    assert loss.weight == 0 and loss.total == 0
    loss.total.backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_kl_is_zero_to_itself_and_both_directions_are_right():
    model, other, inputs = tiny("llama"), tiny("llama", seed=1), tokens("llama")
    out, ref = called(model, inputs), called(other, inputs)
    mask = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert abs(kl(out, called(model, inputs)).total.item()) < 1e-4
    p = (model(**inputs).logits / 2).log_softmax(-1)[mask]
    q = (other(**inputs).logits / 2).log_softmax(-1)[mask]
    for reverse, want in ((False, (q.exp() * (q - p)).sum()), (True, (p.exp() * (p - q)).sum())):
        for budget in (None, FEW):
            got = kl(out, ref, keep=mask, temperature=2.0, reverse=reverse, budget=budget)
            assert torch.allclose(got.total, want, rtol=1e-4)
            assert got.weight == mask.sum()
    weight = torch.rand(out.shape)
    got = kl(out, ref, keep=mask, temperature=2.0, weight_BT=weight, budget=FEW)
    assert torch.allclose(got.total, (((q.exp() * (q - p)).sum(-1)) * weight[mask]).sum(), rtol=1e-4)
    with pytest.raises(UserError, match="like with like"):
        kl(out, called(other, tokens("llama", length=7)))


def test_js_is_that_of_whole_logits_with_its_gradient_however_they_are_cut():
    model, other, inputs = tiny("llama"), tiny("llama", seed=1), tokens("llama")
    out, ref = called(model, inputs), called(other, inputs)
    mask = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    p, q = (m(**inputs).logits.softmax(-1)[mask] for m in (model, other))
    middle = (p + q) / 2
    want = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    want.backward()
    whole = grads_of(model)
    for budget in (None, FEW):
        got = js(called(model, inputs), ref, keep=mask, budget=budget)
        assert got.weight == mask.sum() and torch.allclose(got.total, want, rtol=1e-4)
        got.total.backward()
        assert_close(grads_of(model), whole, tolerance=1e-5)
        other_way = js(called(other, inputs), out, keep=mask, budget=budget).total
        assert torch.allclose(other_way, want, rtol=1e-4)
    assert abs(js(out, called(model, inputs)).total.item()) < 1e-4
    with pytest.raises(UserError, match="JS compares like with like"):
        js(out, called(other, tokens("llama", length=7)))


def test_js_of_answers_that_share_nothing_is_the_logarithm_of_two():
    model, other, inputs = tiny("llama", tied=False), tiny("llama", tied=False), tokens("llama")
    with torch.no_grad():
        for m, token in ((model, 5), (other, 6)):
            m.lm_head.weight.zero_()
            m.lm_head.weight[token] = 1e4 * torch.sign(called(m, inputs).hidden_BTD[0, 0])
    mask = torch.zeros(called(model, inputs).shape, dtype=torch.bool)
    mask[0, 0] = True
    got = js(called(model, inputs), called(other, inputs), keep=mask).total
    assert got.item() == pytest.approx(0.693147, abs=1e-5)


def test_numbers_of_single_positions_come_back_in_place():
    model, inputs = tiny("llama"), tokens("llama")
    out = called(model, inputs)
    labels = labels_for(out)
    want = F.cross_entropy(model(**inputs).logits.transpose(1, 2), labels, reduction="none")
    got = token_nll(out, labels, budget=FEW)
    assert torch.allclose(got, want, atol=1e-5) and not got.requires_grad
    top = out.each(lambda logits: logits.topk(3).values, budget=FEW)
    assert top.shape == (*out.shape, 3)


def test_a_vector_of_sums_a_trainable_scale_and_a_second_backward_are_recomputed():
    model, inputs = tiny("llama"), tokens("llama")
    out = called(model, inputs)
    labels = labels_for(out)
    keep = labels != IGNORE
    scale = nn.Parameter(torch.tensor(1.5))

    def both(logits, labels):
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return torch.stack([loss, logits.logsumexp(-1).square().sum()])

    def scaled(logits, labels):
        return F.cross_entropy(logits * scale, labels, reduction="sum")

    many, one = (out.reduce(both, labels, keep=keep, budget=b) for b in (FEW, None))
    assert many.shape == (2,) and torch.allclose(many, one, rtol=1e-5)
    for fn in (scaled, lambda *a: both(*a) @ torch.tensor([1.0, 0.1])):
        pairs = []
        for budget in (None, FEW):
            out = called(model, inputs)
            out.reduce(fn, labels, keep=keep, budget=budget).backward()
            pairs.append(grads_of(model) | ({"scale": scale.grad} if fn is scaled else {}))
            scale.grad = None
        assert_close(pairs[1], pairs[0])
    out = called(model, inputs)
    loss = cross_entropy(out, labels, budget=FEW).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="recompute=True"):
        loss.backward()
    again = out.reduce(scaled, labels, keep=keep, budget=FEW, recompute=True)
    (first,) = torch.autograd.grad(again, [model.lm_head.weight], retain_graph=True)
    (second,) = torch.autograd.grad(again, [model.lm_head.weight])
    assert torch.equal(first, second)


def test_trainable_tensors_passed_along_get_their_gradient():
    model, inputs = tiny("llama"), tokens("llama")
    pairs = []
    for budget in (None, FEW):
        out = called(model, inputs)
        labels, weight = labels_for(out), torch.linspace(0, 1, 36).view(3, 12).requires_grad_()

        def weighted(logits, labels, weight):
            return (F.cross_entropy(logits, labels, reduction="none") * weight).sum()

        out.reduce(weighted, labels, weight, keep=labels != IGNORE, budget=budget).backward()
        pairs.append(grads_of(model) | {"weight": weight.grad})
    assert_close(pairs[1], pairs[0])


def test_frozen_parts_get_no_gradient_and_no_gradient_mode_builds_no_graph():
    model, inputs = tiny("llama", tied=False), tokens("llama")
    model.lm_head.requires_grad_(False)
    out = called(model, inputs)
    labels = labels_for(out)
    cross_entropy(out, labels, budget=FEW).total.backward()
    frozen_head = grads_of(model)
    assert "lm_head.weight" not in frozen_head and "model.embed_tokens.weight" in frozen_head
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    cross_entropy(called(model, inputs), labels, budget=FEW).total.backward()
    assert grads_of(model).keys() == {"lm_head.weight"}
    with torch.no_grad():
        assert not cross_entropy(called(model, inputs), labels, budget=FEW).total.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_autocast_holds_also_for_logits_taken_outside_of_it(name):
    model, inputs = tiny(name), tokens(name)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits.float()
        out = called(model, inputs)
        inside = cross_entropy(out, labels_for(out), budget=FEW).total
    outside = cross_entropy(out, labels_for(out), budget=FEW).total
    whole = F.cross_entropy(logits.flatten(0, 1), labels_for(out).flatten(), reduction="sum")
    assert torch.equal(inside, outside)
    assert torch.allclose(inside, whole, rtol=1e-3)
    inside.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_bf16_weights_sum_their_gradient_in_float32():
    model, inputs = tiny("llama", tied=False), tokens("llama")
    model.to(torch.bfloat16)
    pairs = []
    for budget in (None, FEW):
        out = called(model, inputs)
        cross_entropy(out, labels_for(out), budget=budget).total.backward()
        pairs.append(model.lm_head.weight.grad.float())
        model.zero_grad()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.allclose(pairs[0], pairs[1], atol=2e-2 * pairs[0].abs().max())


def test_checkpointed_compiled_and_wrapped_models_answer_alike():
    inputs = tokens("llama")
    model = tiny("llama")
    out = called(model, inputs)
    labels = labels_for(out)
    cross_entropy(out, labels, budget=FEW).total.backward()
    plain = grads_of(model)

    model.activation_checkpointing_enable()
    cross_entropy(called(model, inputs), labels, budget=FEW).total.backward()
    assert_close(grads_of(model), plain)
    model.activation_checkpointing_disable()

    anatomy(model).backbone.compile(backend="eager")
    before = vars(anatomy(model).backbone)["_compiled_call_impl"]
    cross_entropy(called(model, inputs), labels, budget=FEW).total.backward()
    assert_close(grads_of(model), plain)
    assert vars(anatomy(model).backbone)["_compiled_call_impl"] is before

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            return self.inner(**inputs)

    wrapped = Wrapped(tiny("llama"))
    cross_entropy(called(wrapped, inputs), labels, budget=FEW).total.backward()
    assert_close({name.removeprefix("inner."): grad for name, grad in grads_of(wrapped).items()}, plain)


def test_adapters_on_the_head_are_part_of_it():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, init_lora_weights=False)
    model, inputs = peft.get_peft_model(tiny("llama", tied=False), config), tokens("llama")
    out = called(model, inputs)
    whole = model(**inputs).logits.flatten(0, 1)
    assert torch.allclose(torch.cat([logits for (logits,) in out.chunks(budget=FEW)]), whole, atol=1e-5)
    labels = labels_for(out)
    F.cross_entropy(whole, labels.flatten(), reduction="sum").backward()
    plain = grads_of(model)
    assert any("lm_head.lora_A" in name for name in plain)
    cross_entropy(called(model, inputs), labels, budget=FEW).total.backward()
    assert_close(grads_of(model), plain)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_routers_own_loss_comes_along_times_its_coefficient(name):
    model, inputs = tiny(name), tokens(name)
    assert called(model, inputs).extra_loss is None
    model.config.output_router_logits = True
    result = model(**inputs)
    out = called(model, inputs)
    assert torch.allclose(out.extra_loss, model.config.router_aux_loss_coef * result.aux_loss)
    out.extra_loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(3, 1, length, length, dtype=torch.bool).tril()
    packed = called(model, {**inputs, "attention_mask": mask})
    assert torch.allclose(packed.hidden_BTD, out.hidden_BTD, atol=1e-6)
    assert torch.allclose(packed.extra_loss, out.extra_loss)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bert"])
def test_needs_bring_what_methods_ask_for(name):
    model, inputs = tiny(name, attention="eager"), tokens(name)
    out = called(model, inputs, needs=frozenset({"hidden", "attentions"}))
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert torch.equal(out.hidden_states[-1], out.hidden_BTD)
    assert (out.encoder_BSD is not None) == (name in ("t5", "bart"))
    with pytest.raises(UserError, match="eager"):
        called(tiny("llama", attention="sdpa"), tokens("llama"), needs=frozenset({"attentions"}))


def test_pictures_go_through_the_models_own_forward():
    model = tiny("llava")
    image = model.config.image_token_id
    ids = tokens("llava")["input_ids"]
    ids[:, 1:5] = image
    inputs = {"input_ids": ids, "pixel_values": torch.rand(3, 3, 16, 16)}
    out = called(model, inputs)
    whole = model(**inputs).logits.flatten(0, 1)
    assert torch.allclose(torch.cat([logits for (logits,) in out.chunks(budget=FEW)]), whole, atol=1e-5)
    cross_entropy(out, labels_for(out), budget=FEW).total.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_a_boxed_backbone_and_experts_in_an_encoder_are_no_obstacle():
    import transformers as tf

    small = {"vocab_size": VOCAB, "num_layers": 2, "d_kv": 8, "num_heads": 4, "d_model": 32, "d_ff": 48}
    opt = tf.OPTConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48)
    switch = tf.SwitchTransformersConfig(**small, num_experts=4, router_jitter_noise=0.0, dropout_rate=0.0)
    for auto, config, inputs in (
        (tf.AutoModelForCausalLM, opt, tokens("llama")),
        (tf.AutoModelForSeq2SeqLM, switch, tokens("t5")),
    ):
        model = auto.from_config(config).eval()
        out = called(model, inputs)
        whole = model(**inputs).logits.flatten(0, 1)
        assert torch.allclose(torch.cat([logits for (logits,) in out.chunks(budget=FEW)]), whole, atol=1e-5)
        cross_entropy(out, labels_for(out), budget=FEW).total.backward()


def test_models_without_a_token_head_answer_with_their_own_output():
    from transformers import AutoModel, AutoModelForSequenceClassification

    config, inputs = CONFIGS["llama"](), tokens("llama")
    out = called(AutoModelForSequenceClassification.from_config(config), inputs)
    assert out.raw.logits.shape == (3, 2) and out.hidden_BTD.shape == (3, 12, 32)
    out = called(AutoModel.from_config(config), inputs)
    with pytest.raises(UserError, match="no token head"):
        cross_entropy(out, labels_for(out))
