"""Merges against their formulae, written out entry by entry, and through whole model folders."""

import json
import math
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.core.tiny import tiny
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.base.method import Method
from tutelage.core import surgery
from tutelage.core.surgery import Site, merge, transform
from tutelage.methods._kit.spectra import effective_rank

SITE = Site(seed=0, stage="merged")


def make(use: str, **settings):
    return registry.make({"use": f"merge/{use}", **settings})


def draw(*shape: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def test_a_linear_merge_is_the_weighted_mean_and_leaves_its_inputs_alone():
    a, b, c = tensors = draw(4, 5)
    kept = a.clone()
    torch.testing.assert_close(make("linear").tensor("w", tensors, None, SITE), (a + b + c) / 3)
    merged = make("linear", weights=[1, 2, 5]).tensor("w", tensors, None, SITE)
    torch.testing.assert_close(merged, (a + 2 * b + 5 * c) / 8)
    raw = make("linear", weights=[0.5, 0.5, -1], normalize=False).tensor("w", tensors, None, SITE)
    torch.testing.assert_close(raw, 0.5 * a + 0.5 * b - c)
    assert torch.equal(a, kept)


def test_all_the_weight_on_one_model_gives_that_model_to_the_bit():
    tensors = draw(4, 5)
    assert torch.equal(make("linear", weights=[0, 3, 0]).tensor("w", tensors, None, SITE), tensors[1])
    assert torch.equal(make("slerp", t=0).tensor("w", tensors[:2], None, SITE), tensors[0])
    assert torch.equal(make("slerp", t=1).tensor("w", tensors[:2], None, SITE), tensors[1])
    assert torch.equal(make("task_arithmetic", scale=0).tensor("w", tensors[1:], tensors[0], SITE), tensors[0])


def test_slerp_turns_evenly_and_keeps_the_norm():
    a = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    third = make("slerp", t=1 / 3).tensor("w", [a, b], None, SITE)
    wanted = torch.tensor([[2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)], [0.0, 0.0]])
    torch.testing.assert_close(third, wanted)
    assert float(make("slerp").tensor("w", [a, b], None, SITE).norm()) == pytest.approx(2.0)
    assert float(make("linear").tensor("w", [a, b], None, SITE).norm()) == pytest.approx(math.sqrt(2.0))


def test_slerp_of_nearly_colinear_or_empty_tensors_is_a_straight_line():
    (a,) = draw(4, 5, count=1)
    for b in (a * 1.5, -a, a + 1e-4):
        torch.testing.assert_close(make("slerp", t=0.25).tensor("w", [a, b], None, SITE), 0.75 * a + 0.25 * b)
    zero = make("slerp").tensor("w", [torch.zeros(3), torch.zeros(3)], None, SITE)
    assert torch.equal(zero, torch.zeros(3))


@pytest.mark.parametrize("use", ["slerp", "effective_rank"])
def test_a_merge_of_two_refuses_three_models(use, tmp_path):
    with pytest.raises(UserError, match=f"stages.merged.start: merge/{use} takes 2 models; here are 3"):
        merge(make(use), [tmp_path] * 3, tmp_path, SITE, place="stages.merged")


def test_task_arithmetic_adds_and_takes_away_task_vectors():
    base, one, two = draw(4, 5)
    merged = make("task_arithmetic", weights=[1.0, -0.5], scale=0.4).tensor("w", [one, two], base, SITE)
    torch.testing.assert_close(merged, base + 0.4 * ((one - base) - 0.5 * (two - base)))
    torch.testing.assert_close(make("task_arithmetic").tensor("w", [one], base, SITE), one)


def ties_by_hand(base, models, *, density, weights, scale):
    """Trim, elect, disjoint mean, one entry at a time."""
    vectors = []
    for model in models:
        vector = (model - base).flatten().tolist()
        order = sorted(range(len(vector)), key=lambda i: -abs(vector[i]))
        kept = set(order[: int(density * len(vector))])
        vectors.append([v if i in kept else 0.0 for i, v in enumerate(vector)])
    merged = []
    for i in range(base.numel()):
        entries = [(v[i] * w, w) for v, w in zip(vectors, weights, strict=True)]
        sign = 1 if sum(v for v, _ in entries) >= 0 else -1
        agree = [(v, w) for v, w in entries if v * sign > 0]
        merged.append(sum(v for v, _ in agree) / sum(w for _, w in agree) if agree else 0.0)
    return base + scale * torch.tensor(merged).view_as(base)


@pytest.mark.parametrize(("density", "weights", "scale"), [(0.2, [1, 1, 1], 1.0), (0.5, [0.3, 1.0, 0.7], 0.8)])
def test_ties_trims_elects_signs_and_takes_the_disjoint_mean(density, weights, scale):
    base, *models = draw(6, 10, count=4)
    merged = make("ties", density=density, weights=weights, scale=scale).tensor("w", models, base, SITE)
    wanted = ties_by_hand(base, models, density=density, weights=weights, scale=scale)
    torch.testing.assert_close(merged, wanted)


def test_ties_of_one_model_keeps_its_largest_changes():
    base, model = draw(10, 10, count=2)
    merged = make("ties", density=0.13).tensor("w", [model], base, SITE)
    changed = merged != base
    assert int(changed.sum()) == 13
    torch.testing.assert_close(merged[changed], model[changed])
    assert (model - base).abs()[changed].min() >= (model - base).abs()[~changed].max()


def test_a_wrong_number_of_weights_and_a_base_alone_are_refused():
    tensors = draw(2, 2)
    with pytest.raises(UserError, match=r"merge/linear.weights: 2 numbers for 3 models"):
        make("linear", weights=[1, 2]).tensor("w", tensors, None, SITE)
    with pytest.raises(UserError, match="add up to 0"):
        make("linear", weights=[1, 1, -2]).tensor("w", tensors, None, SITE)
    for use in ("ties", "task_arithmetic"):
        with pytest.raises(UserError, match="base alone"):
            make(use).tensor("w", [], tensors[0], SITE)


def test_a_merged_folder_is_a_model_that_transformers_loads(tmp_path):
    models = [tiny("llama", seed=seed) for seed in (0, 1)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    (tmp_path / "merged").mkdir()
    transform(make("linear"), [tmp_path / "0", tmp_path / "1"], tmp_path / "merged", place="stages.merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    first, second = (model.state_dict() for model in models)
    for name, value in merged.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)


# -- DARE -------------------------------------------------------------------------------------------------------------


def drops(name: str, rate: float, *, model: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The mask that DARE draws, by the rule its replay promises."""
    return torch.rand(shape, generator=SITE.rng(f"drop|{model}|{name}")) >= rate


def test_dare_drops_at_random_divides_by_what_is_kept_and_adds_task_vectors():
    base, one, two = draw(40, 50)
    dare = make("dare", drop=[0.9, 0.5], weights=[1.0, -0.5], scale=0.4)
    first, second = (drops("w", rate, model=i, shape=(40, 50)) for i, rate in enumerate((0.9, 0.5)))
    wanted = base + 0.4 * ((one - base) * first / 0.1 - 0.5 * (two - base) * second / 0.5)
    torch.testing.assert_close(dare.tensor("w", [one, two], base, SITE), wanted)
    assert 0.07 < float(first.float().mean()) < 0.13 and 0.46 < float(second.float().mean()) < 0.54


def test_dare_through_ties_elects_signs_among_what_was_kept():
    base, one, two, three = models = draw(6, 10, count=4)
    weights = [0.3, 1.0, 0.7]
    dropped = [base + (m - base) * drops("w", 0.5, model=i, shape=(6, 10)) / 0.5 for i, m in enumerate(models[1:])]
    wanted = ties_by_hand(base, dropped, density=1, weights=weights, scale=0.8)
    dare = make("dare", drop=0.5, combine="ties", weights=weights, scale=0.8, normalize=True)
    torch.testing.assert_close(dare.tensor("w", [one, two, three], base, SITE), wanted)
    nothing = make("dare", drop=0, combine="ties", weights=weights, normalize=True)
    ties = make("ties", density=1, weights=weights)
    kept = [nothing.tensor("w", models[1:], base, SITE), ties.tensor("w", models[1:], base, SITE)]
    assert torch.equal(*kept)


def test_dare_keeps_the_expectation_of_task_arithmetic():
    base, one, two = draw(20, 30)
    dare, whole = make("dare", drop=0.8), make("task_arithmetic").tensor("w", [one, two], base, SITE)
    sites = [Site(seed=seed, stage="merged") for seed in range(400)]
    mean = torch.stack([dare.tensor("w", [one, two], base, site) for site in sites]).mean(0)
    # one draw's variance is d²·p/(1−p) an entry and model; 400 draws leave a deviation of d·√4/20
    error = (4 * ((one - base).square() + (two - base).square()) / 400).sqrt()
    assert float(((mean - whole) / error).square().mean()) == pytest.approx(1.0, abs=0.15)
    unscaled = make("dare", drop=0.8, rescale=False)
    mean = torch.stack([unscaled.tensor("w", [one, two], base, site) for site in sites]).mean(0)
    assert float(((mean - base) / (whole - base)).median()) == pytest.approx(0.2, abs=0.02)


def test_what_dare_drops_is_a_function_of_seed_stage_name_and_place_of_the_model():
    base, one, _ = draw(8, 8)
    dare = make("dare", drop=0.5)

    def kept(name: str, models: int, site: Site) -> list[bool]:
        """Which entries of the last model were kept, all others being the base."""
        tensors = [*[base] * (models - 1), one]
        return (dare.tensor(name, tensors, base, site) != base).flatten().tolist()

    first = kept("w", 1, SITE)
    assert kept("v", 1, SITE) != first == kept("w", 1, SITE)
    assert kept("w", 2, SITE) != first
    assert kept("w", 1, Site(seed=1, stage="merged")) != first != kept("w", 1, Site(seed=0, stage="other"))


def test_dare_refuses_a_chance_of_one_and_rates_that_do_not_match():
    with pytest.raises(UserError, match="drop"):
        make("dare", drop=1.0)
    with pytest.raises(UserError, match=r"merge/dare.drop: 2 numbers for 1 models"):
        make("dare", drop=[0.5, 0.5]).tensor("w", draw(2, 2, count=1), draw(2, 2)[0], SITE)


def test_a_merge_by_chance_is_the_same_again_and_another_with_another_seed(tmp_path):
    for i in range(3):
        tiny("llama", seed=i).save_pretrained(tmp_path / str(i))
    found = []
    for seed in (3, 3, 4):
        out = tmp_path / f"merged-{len(found)}"
        out.mkdir()
        folders = [tmp_path / str(i) for i in range(3)]
        transform(make("dare"), folders, out, place="stages.merged", seed=seed, stage="merged")
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


# -- effective rank ---------------------------------------------------------------------------------------------------


def test_the_effective_rank_is_the_exponential_of_the_entropy_of_the_shares():
    values = torch.tensor([[6.0, 3.0, 1.0], [2.0, 2.0, 2.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    shares = (0.6, 0.3, 0.1)
    wanted = [math.exp(-sum(p * math.log(p) for p in shares)), 3.0, 1.0, 0.0]
    torch.testing.assert_close(effective_rank(values), torch.tensor(wanted))


def with_values(values: list[float], rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), generator=generator))[0] for n in (rows, columns))
    return left @ torch.diag(torch.tensor(values)) @ right.T


@pytest.mark.parametrize("gamma", [0.0, 0.2])
def test_what_lies_beyond_the_effective_rank_of_the_change_is_weakened(gamma):
    base = draw(12, 8, count=1)[0]
    values = [4.0, 2.0, 1.0, 0.15, 0.1, 0.05]  # effective rank 3.1: the first four stay
    method = make("effective_rank", gamma=gamma)
    merged = method.tensor("w", [base + with_values(values, 12, 8)], base, SITE)
    wanted = base + with_values([*values[:4], *(gamma * v for v in values[4:])], 12, 8)
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=1e-5)
    shares = [v / sum(values) for v in values]
    wanted_rank = math.exp(-sum(p * math.log(p) for p in shares))
    assert 3 < method.state["effective_rank/w"] == pytest.approx(wanted_rank, abs=1e-3)


def test_gamma_one_vectors_and_unchanged_weights_give_the_tuned_model():
    base, tuned = draw(12, 8, count=2)
    torch.testing.assert_close(make("effective_rank", gamma=1.0).tensor("w", [tuned], base, SITE), tuned)
    method = make("effective_rank")
    assert torch.equal(method.tensor("v", [tuned[0]], base[0], SITE), tuned[0])
    assert torch.equal(method.tensor("w", [base], base, SITE), base)
    assert method.state == {}


def test_each_matrix_of_a_stack_has_an_effective_rank_of_its_own():
    base = draw(2, 12, 8, count=1)[0]
    changes = [with_values([3.0, 0.2, 0.1], 12, 8), with_values([1.0, 1.0, 1.0], 12, 8, seed=1)]
    method = make("effective_rank", gamma=0)
    merged = method.tensor("w", [base + torch.stack(changes)], base, SITE)
    alone = [make("effective_rank", gamma=0).tensor("w", [b + c], b, SITE) for b, c in zip(base, changes, strict=True)]
    torch.testing.assert_close(merged, torch.stack(alone))
    assert 2.0 < method.state["effective_rank/w"] < 3.0


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_merge_in_several_files_and_types_is_the_merge_in_one(tmp_path, monkeypatch):
    for i in range(2):
        tiny("llama", seed=i).to(torch.bfloat16).save_pretrained(tmp_path / str(i))
        tensors = load_file(tmp_path / str(i) / "model.safetensors")
        tensors |= {"count": torch.tensor([3]), "rate": torch.tensor(0.5), "odd": torch.ones(3, dtype=torch.bfloat16)}
        save_file(tensors, tmp_path / str(i) / "model.safetensors", metadata={"format": "pt"})
    for name, size in (("whole", surgery.SHARD), ("parts", 20_000)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(surgery, "SHARD", size)
        transform(make("linear"), [tmp_path / "0", tmp_path / "1"], tmp_path / name, place="stages.merged")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    whole, parts = load_file(tmp_path / "whole" / "model.safetensors"), {}
    for path in sorted((tmp_path / "parts").glob("*.safetensors")):
        found = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in found)
        parts |= found
    assert len(set(index["weight_map"].values())) > 2
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole["odd"].dtype == torch.bfloat16 and int(whole["count"]) == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "parts")


def test_a_merge_lets_go_of_a_tensor_when_it_is_written(tmp_path):
    for i in range(2):
        save_file({f"w{n}": torch.full((4, 4), float(n + i)) for n in range(20)}, tmp_path / f"{i}.safetensors")
        (tmp_path / str(i)).mkdir()
        (tmp_path / f"{i}.safetensors").rename(tmp_path / str(i) / "model.safetensors")
    results: list[weakref.ref[torch.Tensor]] = []
    held = []

    class Watched(Method):
        def tensor(self, name, tensors, base, view):
            held.append(sum(result() is not None for result in results))
            result = tensors[0] + tensors[1]
            results.append(weakref.ref(result))
            return result

    (tmp_path / "out").mkdir()
    transform(Watched(), [tmp_path / "0", tmp_path / "1"], tmp_path / "out", place="stages.merged")
    assert len(held) == 20 and max(held) <= 1
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w3"], torch.full((4, 4), 7.0))


def test_a_damaged_start_is_named(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is damaged or cut short"):
        surgery.Weights(tmp_path)
