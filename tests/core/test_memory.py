"""The estimate is within half of what a step really takes, and running out of memory is recognized."""

import subprocess
import sys

import pytest
import torch
import transformers as tf

from tests.core.tiny import CONFIGS, NAMES, tiny
from tutelage.base.errors import UserError
from tutelage.core.anatomy import anatomy
from tutelage.core.memory import available, estimate, in_use, is_oom
from tutelage.core.out import cross_entropy, forward

ROWS, LENGTH = 4, 128


def llama(**changes):
    config = {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    return tf.LlamaConfig(**config | changes)


def mixture():
    config = llama().to_dict() | {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.MixtralConfig(
        **{key: value for key, value in config.items() if key not in ("model_type", "rope_parameters")}
    )


def real_peak(config, *, chunk=None, checkpointing=False, autocast=None, attention="sdpa"):
    """The most bytes allocated at once in a step with AdamW, weights included, from the allocator's own events."""
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    parts = anatomy(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    tokens = torch.randint(0, config.vocab_size, (ROWS, LENGTH))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            loss = cross_entropy(forward(model, {"input_ids": tokens}, anatomy=parts), tokens, budget=chunk)
        loss.total.backward()
        optimizer.step()

    step()
    held = sum(p.nbytes * 4 for p in model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return held + peak


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 2**16},
        {"checkpointing": True},
        {"autocast": torch.bfloat16},
        {"attention": "eager"},
        {"config": mixture},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_estimate_is_near_the_real_peak(options):
    options = dict(options)
    config = options.pop("config", llama)()
    real = real_peak(config, **options)
    config._attn_implementation = options.pop("attention", "sdpa")
    parts = estimate(config, batch_rows=ROWS, length=LENGTH, **options)
    work, weights = parts["activations"] + parts["logits"], 4 * parts["weights"]
    assert parts["total"] == work + weights
    assert 0.67 < parts["total"] / real < 1.5
    assert 0.67 < work / (real - weights) < 1.5


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing_and_half_precision():
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(llama())
    plain = estimate(model, batch_rows=ROWS, length=LENGTH)
    assert plain["weights"] == sum(p.numel() for p in model.parameters()) * 4 == plain["gradients"]
    assert plain["optimizer"] == 2 * plain["weights"]
    double = estimate(model, batch_rows=2 * ROWS, length=LENGTH)
    assert double["activations"] == pytest.approx(2 * plain["activations"], rel=0.05)
    less = estimate(model, batch_rows=ROWS, length=LENGTH, checkpointing=True)
    assert less["activations"] < plain["activations"] / 2
    half = estimate(model, batch_rows=ROWS, length=LENGTH, dtype=torch.bfloat16)
    assert half["activations"] < 0.75 * plain["activations"] and half["weights"] == plain["weights"] / 2
    assert estimate(model, batch_rows=ROWS, length=LENGTH, chunk=2048)["logits"] < plain["logits"]
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert estimate(model, batch_rows=ROWS, length=LENGTH)["gradients"] == model.lm_head.weight.numel() * 4


@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_an_estimate(name):
    for model in (tiny(name).to("meta"), CONFIGS[name]()):
        parts = estimate(model, batch_rows=2, length=16)
        assert all(parts[key] > 0 for key in ("weights", "gradients", "optimizer", "activations", "logits"))


def test_a_configuration_of_no_language_model_is_refused():
    with pytest.raises(UserError, match="CLIPVisionConfig"):
        estimate(tf.CLIPVisionConfig(), batch_rows=1, length=8)


def test_there_is_memory_and_running_out_of_it_is_recognized():
    assert available("cpu") > 2**20
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_oom(caught.value)
    assert is_oom(torch.OutOfMemoryError("CUDA out of memory")) and is_oom(MemoryError())
    wrapped = ValueError("step failed")
    wrapped.__cause__ = MemoryError()
    assert is_oom(wrapped)
    assert not is_oom(RuntimeError("shapes do not match")) and not is_oom(ValueError("out of memory"))


def test_memory_that_tensors_free_is_there_for_the_next_ones() -> None:
    """In a process of its own, since the setting stays; the pages that a step fetches are counted by the system."""
    code = """
import resource, sys, torch
from tutelage.core import memory
memory.hold()
def step():
    held = [torch.ones(1 << 21) for _ in range(6)]  # 8 MiB each
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 100


def test_what_is_held_is_seen_to_grow_and_to_go_and_the_peak_stays():
    size = 256 << 20
    before, _ = in_use("cpu")
    block = torch.ones(size, dtype=torch.uint8)
    now, peak = in_use("cpu")
    assert 0.9 * size < now - before < 1.2 * size and peak >= now
    del block
    after, still = in_use("cpu")
    assert after < now - 0.9 * size and still > before + 0.9 * size


def test_of_a_gpu_what_torch_allocated_is_told(monkeypatch):
    counted = {"allocated_bytes": {"all": {"current": 3, "peak": 9, "allocated": 20, "freed": 17}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: counted)
    assert in_use("cuda") == (3, 9)
