"""SLTrain beside its formulas: the weight put together, gradients by hand, what is held, and whole stages from fresh weights."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from tests.core.tiny import tiny
from tests.methods.test_lora import view_of
from tests.toy import graph
from tutelage import sizing
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core.acts.modules import _unfroze
from tutelage.core.anatomy import anatomy
from tutelage.core.graph import Methods
from tutelage.core.run import run_graph
from tutelage.methods.param.sparse_plus_lowrank import Factors, holds

M, N, R = 12, 20, 3


def make(**settings):
    return registry.make({"use": "param/sparse_plus_lowrank", "r": R, "alpha": 1.5, "density": 0.1, **settings})


def factors(*, fresh=True, seed=0, **settings):
    torch.manual_seed(1)
    layer = torch.nn.Linear(N, M).double()
    weight = layer.weight.detach().clone()
    made = Factors(layer, make(**settings), torch.Generator().manual_seed(seed), fresh=fresh)
    return made, layer, weight


def by_hand(made, weight=None):
    """scale · B A with `values` added at `places`, entry by entry."""
    whole = 0.5 * made.factor_B.weight.detach() @ made.factor_A.weight.detach()
    whole = whole if weight is None else whole + weight
    for place, value in zip(made.places.tolist(), made.values.tolist(), strict=True):
        whole[place // N, place % N] += value
    return whole


@pytest.mark.parametrize("fresh", [True, False])
def test_answers_and_gradients_are_those_of_the_weight_that_the_factors_stand_for(fresh):
    made, _, weight = factors(fresh=fresh)
    with torch.no_grad():
        made.factor_B.weight.normal_()
        made.values.normal_()
    dense = by_hand(made, None if fresh else weight).requires_grad_(True)
    x = torch.randn(4, 5, N, dtype=torch.float64)
    one, other = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    answer, wanted = made(one), other @ dense.T + made.bias.detach()
    torch.testing.assert_close(answer, wanted)
    torch.testing.assert_close(make().fold(made), dense.detach())
    answer.square().sum().backward()
    wanted.square().sum().backward()
    g = dense.grad
    torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(made.factor_B.weight.grad, 0.5 * g @ made.factor_A.weight.T)
    torch.testing.assert_close(made.factor_A.weight.grad, 0.5 * made.factor_B.weight.T @ g)
    torch.testing.assert_close(made.values.grad, g.flatten()[made.places.long()])
    assert made.held is None or made.held.grad is None or not make().trains("held")


def test_places_and_first_values_are_as_the_authors_draw_them():
    made, layer, _ = factors()
    places = made.places.tolist()
    assert len(places) == int(0.1 * M * N) and places == sorted(set(places)) and places[0] >= 0 and places[-1] < M * N
    assert places != factors(seed=1)[0].places.tolist()
    for tensor in (made.factor_A.weight, made.values):
        assert 0.8 / math.sqrt(N) < float(tensor.detach().abs().max()) <= 1 / math.sqrt(N)
    assert not made.factor_B.weight.any() and layer.weight.numel() == 0
    lowrank, _, _ = factors(density=0.0)
    assert lowrank.factor_B.weight.any() and torch.linalg.matrix_rank(lowrank.whole()) == R
    held, layer, weight = factors(fresh=False)
    assert torch.equal(held.whole(), weight) and layer.weight.numel() == M * N


def test_backward_holds_no_whole_weight():
    made, _, _ = factors()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.numel()) or t, lambda t: t):
        made(torch.randn(2, N, dtype=torch.float64))
    assert M * N not in seen


def test_a_step_takes_the_weights_making_twice_and_the_gradients_of_its_factors_more_than_a_dense_layers():
    made, rows = factors()[0], 16
    with FlopCounterMode(display=False) as counter:
        made(torch.randn(rows, N, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 2 * (3 * rows * M * N + 4 * M * N * R)  # two operations a multiplication


def test_it_holds_only_where_both_parts_learn():
    off = {"rank": 32.0, "reached": 1.0, "kept": 2.0}
    assert holds({"rank": 31.0, "reached": 1.0, "kept": 0.4}, off)
    assert not holds({"rank": 2.0, "reached": 1.0, "kept": 0.4}, off), "nothing but the product"
    assert not holds({"rank": 31.0, "reached": 0.1, "kept": 0.4}, off), "nothing but the sparse matrix"


def test_a_layer_trains_the_papers_count_of_numbers_and_gpt2s_turned_weights_too():
    for name in ("llama", "gpt2"):
        model, method = tiny(name), make()
        view = SimpleNamespace(**vars(view_of(model)), fresh=True)
        for label in view.engine.anatomy.linears:
            layer = model.get_submodule(label)
            shape = layer.weight.shape
            wrapper = method.wrap(layer, label, view)
            m, n = wrapper.shape
            trained = sum(p.numel() for key, p in wrapper.named_parameters() if method.trains(key) and key != "bias")
            assert trained == (m + n) * R + int(0.1 * m * n)
            assert method.fold(wrapper).shape == shape


def run(folder, **engine):
    def change(recipe):
        one, two = recipe["stages"]["one"], recipe["stages"]["two"]
        one["methods"] = [{"use": "param/sparse_plus_lowrank", "r": 4, "alpha": 4.0, "density": 0.1}]
        one["engine"] = {"device": "cpu", "clip": None, **engine}
        one["until"] = two["until"] = "3step"
        del recipe["stages"]["two"]

    run_graph(graph(folder, change=change), only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    state = max((folder / "runs" / "toy" / "one" / "1" / "state").glob("*/model.safetensors"))
    return load_file(folder / "runs" / "toy" / "one" / "1" / "artifact" / "model" / "model.safetensors"), load_file(
        state
    )


def test_from_fresh_weights_all_is_trained_nothing_whole_is_held_and_whole_weights_are_left(tmp_path):
    weights, state = run(tmp_path / "plain")
    name = "model.layers.0.mlp.up_proj"
    assert weights[f"{name}.weight"].shape == (64, 32) and torch.linalg.matrix_rank(weights[f"{name}.weight"]) > 4
    assert f"{name}.weight" not in state and f"{name}.held" not in state
    stepped, _ = run(tmp_path / "fused", fused_backward=True)
    assert {key: t for key, t in weights.items() if not torch.equal(t, stepped[key])} == {}
    assert not torch.equal(weights["model.norm.weight"], torch.ones(32)), "what is not wrapped is trained as ever"


def test_a_plan_knows_that_whole_weights_are_let_go_of():
    stage = SimpleNamespace(train=None, length=32, engine=SimpleNamespace(quantize=None))
    whole = tiny("llama", tied=False)
    modality = SimpleNamespace(model=lambda *args, **kwargs: copy.deepcopy(whole).to("meta"))
    node = SimpleNamespace(stage=stage, graph=SimpleNamespace(modality=modality))
    plain = sizing.model_of(node, {}, processor=None, methods=Methods({}, []))
    fresh = sizing.model_of(node, {}, processor=None, methods=Methods({}, [make()]), fresh=True)
    later = sizing.model_of(node, {}, processor=None, methods=Methods({}, [make()]))
    assert fresh.notes == later.notes == [] and fresh.trained == later.trained < plain.trained
    small, plain, most = (sizing.weights_of(node, found) for found in (fresh, plain, later))
    assert small == 4 * fresh.trained < plain < most == plain + small - 4 * outside()


def outside():
    """Numbers of a Llama that lie in no linear layer of a block."""
    model = tiny("llama", tied=False)
    inside = sum(model.get_submodule(name).weight.numel() for name in anatomy(model).linears)
    return sum(p.numel() for p in model.parameters()) - inside


def test_what_is_not_wrapped_may_be_freed_but_no_held_weight():
    model, method = tiny("llama"), make()
    view = SimpleNamespace(**vars(view_of(model)), fresh=False)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    wrapper = method.wrap(layer, name, view)
    model.model.layers[0].mlp.up_proj = wrapper
    wrapped, trial = {name: (wrapper, method, layer)}, SimpleNamespace(trained=set())
    methods = SimpleNamespace(having=lambda hook: [method])
    found = SimpleNamespace(
        engine=SimpleNamespace(model=model, anatomy=anatomy(model)), wrapped=wrapped, methods=methods
    )
    _unfroze(found, trial, SimpleNamespace(modules=["*embed_tokens*", f"{name}.values"]), "unfreeze")
    with pytest.raises(UserError, match="only its own parts"):
        _unfroze(found, trial, SimpleNamespace(modules=[f"{name}.held"]), "unfreeze")
