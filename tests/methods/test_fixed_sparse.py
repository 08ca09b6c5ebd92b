"""Fixed sparsity: where the zeros are, that they stay and then learn, and what is counted of them."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.core.tiny import tiny
from tests.toy import graph, numbers
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core.anatomy import anatomy
from tutelage.core.run import run_graph
from tutelage.methods._kit.blocks import BLOCK
from tutelage.methods.param.fixed_sparse import places
from tutelage.modalities.text import toy


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_so_many_places_are_empty_exactly_and_any_is_as_likely_as_any_other():
    assert [int(places(torch.Size([7, 9]), s, generator(0)).sum()) for s in (0.0, 0.5, 0.75)] == [0, 32, 47]
    drawn = torch.stack([places(torch.Size([4, 5]), 0.75, generator(seed)) for seed in range(2000)]).float().mean(0)
    assert (drawn - 0.75).abs().max() < 0.04


def test_no_gradient_is_left_there_and_no_weight_whatever_the_optimizer_did():
    model = tiny("mixtral", tied=False)
    engine = SimpleNamespace(anatomy=anatomy(model), params=dict(model.named_parameters()))
    view = SimpleNamespace(engine=engine, rng=lambda purpose: generator(sum(purpose.encode())))
    method = registry.make({"use": "param/fixed_sparse", "sparsity": 0.6})
    method.begin(model, view)
    grads = {name: torch.ones_like(p) for name, p in engine.params.items()}
    method.grads(grads, view)
    with torch.no_grad():
        for p in engine.params.values():
            p.add_(1.0)
    method.after(engine.params, view)
    for name, p in engine.params.items():
        inside = BLOCK.fullmatch(name) and engine.anatomy.role(name) in ("matrix", "expert")
        assert float((p == 0).float().mean()) == pytest.approx(0.6 if inside else 0, abs=0.01), name
        assert torch.equal(p == 0, grads[name] == 0)
    assert any(name.endswith("experts.down_proj") for name in method.state["zero"])


def test_under_a_wrapper_it_is_refused():
    model = tiny("llama")
    engine = SimpleNamespace(anatomy=anatomy(model), params={"model.norm.weight": model.model.norm.weight})
    with pytest.raises(UserError, match="no whole matrix"):
        registry.make("param/fixed_sparse").begin(model, SimpleNamespace(engine=engine))


def test_zeros_stay_for_a_stage_then_learn_and_operations_are_counted_by_phase(tmp_path):
    def change(recipe):
        one, two = recipe["stages"]["one"], recipe["stages"]["two"]
        one["methods"] = ["param/fixed_sparse"]
        for stage in (one, two):
            stage["until"] = "3step"
            stage["evals"] = {**stage["evals"], "run": ["probe/sparse_flops"]}

    run_graph(graph(tmp_path, change=change), only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    sparse, dense = (tmp_path / "runs" / "toy" / name / "1" for name in ("one", "two"))
    weights = [load_file(stage / "artifact" / "model" / "model.safetensors") for stage in (sparse, dense)]
    blocks = [name for name, t in weights[0].items() if BLOCK.fullmatch(name) and t.ndim == 2]
    width, inner, layers = (toy.MODELS["llama"][k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    whole = layers * (4 * width * width + 3 * width * inner)
    zeros = [sum(int((w[name] == 0).sum()) for name in blocks) for w in weights]
    assert zeros[0] == 0.75 * whole and zeros[1] < 0.01 * whole
    (*_, last), (*_, after) = (numbers(stage, kind="eval") for stage in (sparse, dense))
    trained = numbers(sparse, kind="train")[-1]
    found = last["values"]
    assert found["zeros"] == 0.75 and found["flops/dense"] == trained["flops"]
    # 2 operations a multiply-add, 3 products: what a quarter of the matrices would take is left of theirs
    assert found["flops/dense"] - found["flops/sparse"] == 6 * 0.75 * whole * trained["tokens"]
    assert after["values"]["flops/sparse"] == pytest.approx(after["values"]["flops/dense"], rel=0.01)
