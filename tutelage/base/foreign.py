"""Names that people bring from other systems, and what each is called here.

The unknown-key error and docs/coming-from.md are both made from this table: `python -m tutelage.base.foreign` prints
the page.
"""

from __future__ import annotations

from typing import NamedTuple

HF, AX, LF, TT, NC, TRL = "Hugging Face", "Axolotl", "LLaMA-Factory", "torchtune", "nanochat", "TRL"
_ALL = (HF, AX, LF)


class Foreign(NamedTuple):
    """One thing that has other names elsewhere: its names, who says so, how it is written here, and a remark."""

    names: tuple[str, ...]
    systems: tuple[str, ...]
    here: str
    remark: str = ""


# fmt: off
GROUPS: dict[str, tuple[Foreign, ...]] = {
    "The model": (
        Foreign(("model_name_or_path", "model_name"), (HF, TRL, LF), "start: ./Qwen2.5-0.5B", "a folder, a hub name, a config file or a stage"),
        Foreign(("base_model", "base_model_config"), (AX,), "start: ./Qwen2.5-0.5B"),
        Foreign(("model", "checkpointer"), (TT,), "start: ./Qwen2.5-0.5B"),
        Foreign(("adapter_name_or_path", "lora_model_dir", "pretrain_lora"), (LF, AX), "methods: [{use: param/lora, r: 16}]", "`initial: ./my-adapter` instead of `r` goes on from one"),
        Foreign(("resume_from_checkpoint", "auto_resume_from_checkpoints", "resume_from_step"), (HF, AX, TT, NC), "nothing to write: `tutelage run` goes on from the last save", "`start: base@500` begins a new stage at a step of another"),
        Foreign(("tokenizer_name", "tokenizer_config", "tokenizer_type"), (HF, AX), "tokenizer: ./Qwen2.5-0.5B", "the start's when left out"),
        Foreign(("special_tokens", "additional_special_tokens", "new_special_tokens", "add_special_tokens"), (AX, LF), "tokenizer: ./my-tokenizer", "a tokenizer folder that already has them"),
        Foreign(("trust_remote_code",), (HF, AX, LF), "nothing: code from a model's folder is never run"),
        Foreign(("model_type", "type_of_model", "is_llama_derived_model", "auto_model"), (AX,), "nothing: the class is read from the model's config"),
        Foreign(("depth", "aspect_ratio", "head_dim"), (NC,), "start: recipes/models/llama-1m.yaml", "sizes stand in the model's config"),
    ),
    "How long": (
        Foreign(("num_train_epochs", "num_epochs", "epochs"), (HF, AX, LF, TT), "until: 3epoch"),
        Foreign(("max_steps", "max_train_steps", "num_iterations", "max_steps_per_epoch"), (HF, AX, LF, TT, NC), "until: 500step"),
        Foreign(("target_flops",), (NC,), "until: 1e13flop"),
        Foreign(("target_param_data_ratio", "max_tokens", "num_tokens"), (NC,), "until: 20Mtok"),
    ),
    "Batch and length": (
        Foreign(("per_device_train_batch_size", "device_batch_size", "batch_size", "train_batch_size"), (HF, LF, TT, NC), "batch: 128ktok", "of an optimizer step over all devices, in tokens or rows (`8sample`); the micro-batch is found, or set by engine: {micro: 4}"),
        Foreign(("micro_batch_size",), (AX,), "engine: {micro: 4}", "rows of a micro-batch; found by trial when left out"),
        Foreign(("gradient_accumulation_steps",), (HF, AX, LF, TT), "batch: 128ktok", "accumulation follows from `batch` and the micro-batch that fits"),
        Foreign(("total_batch_size", "global_batch_size"), (NC,), "batch: 512ktok"),
        Foreign(("auto_find_batch_size",), (HF, AX), "nothing: the micro-batch is always found"),
        Foreign(("sequence_len", "sequence_length", "eval_sequence_len"), (AX,), "length: 2048"),
        Foreign(("cutoff_len",), (LF,), "length: 2048"),
        Foreign(("max_seq_length", "max_seq_len", "max_length", "block_size", "seq_len", "model_max_length"), (HF, TRL, TT, NC), "length: 2048"),
        Foreign(("packing", "sample_packing", "neat_packing", "pad_to_sequence_len", "packed", "group_by_length", "multipack_real_batches"), (TRL, AX, LF, TT, HF), "packing: documents", "the default; documents in a row do not see each other (`concat` joins them, `single` is one a row)"),
        Foreign(("per_device_eval_batch_size", "eval_batch_size"), (HF, AX, LF), "nothing: measurement finds its own batch", "evals: {passages: 64} says how many are measured"),
    ),
    "Optimizer": (
        Foreign(("learning_rate", "lr"), (*_ALL, TT), "optim: {use: optim/adamw, lr: 2e-5}"),
        Foreign(("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio"), (NC, AX, LF), "groups: [{match: '*embed*', rate: 0.1}]", "a factor on the optimizer's rate"),
        Foreign(("optimizer", "optim_args", "use_badam", "use_apollo"), (AX, HF, LF, TT), "optim: optim/adamw", "`tutelage methods` lists all"),
        Foreign(("use_galore", "galore_rank", "galore_update_interval", "galore_scale", "galore_target", "optim_target_modules"), (LF, HF, AX), "optim: {use: optim/galore, rank: 128, refresh: 200, scale: 0.25}", "the matrices of all blocks"),
        Foreign(("galore_layerwise", "optimizer_in_bwd", "enable_optimizer_in_backward"), (LF, TT), "engine: {clip: null, fused_backward: true}", "a parameter is stepped as soon as its gradient is whole"),
        Foreign(("weight_decay",), (*_ALL, NC), "optim: {use: optim/adamw, decay: 0.1}"),
        Foreign(("adam_beta1", "adam_beta2", "adam_beta3"), _ALL, "optim: {use: optim/adamw, betas: [0.9, 0.95]}"),
        Foreign(("adam_epsilon", "adam_epsilon2"), _ALL, "optim: {use: optim/adamw, eps: 1e-8}"),
        Foreign(("max_grad_norm", "gradient_clip_val", "clip_grad_norm", "grad_clip"), (*_ALL, TT), "engine: {clip: 1.0}"),
    ),
    "Schedule": (
        Foreign(("lr_scheduler_type", "lr_scheduler"), _ALL, "schedule: schedule/cosine", "`tutelage methods` lists all"),
        Foreign(("lr_scheduler_kwargs", "cosine_min_lr_ratio", "cosine_constant_lr_ratio", "final_lr_frac"), (HF, AX, LF, NC), "schedule: {use: schedule/cosine, floor: 0.1}"),
        Foreign(("warmup_ratio", "warmup_pct"), _ALL, "schedule: {use: schedule/cosine, warm: 3%}"),
        Foreign(("warmup_steps", "num_warmup_steps"), (*_ALL, TT, NC), "schedule: {use: schedule/cosine, warm: 100step}"),
        Foreign(("warmdown_ratio", "decay_ratio", "lr_decay_ratio"), (NC,), "schedule: {use: schedule/wsd, cooldown: 20%}"),
    ),
    "Data": (
        Foreign(("datasets", "pretraining_dataset"), (AX,), "data: {mine: {path: 'data/*.jsonl'}}", "sources by name; a hub data set is {hub: name}"),
        Foreign(("dataset", "train_file", "dataset_name", "dataset_path", "train_dataset"), (LF, HF, TRL, TT), "data: {mine: {path: 'data/*.jsonl'}}", "a hub data set is {hub: name}"),
        Foreign(("dataset_dir", "dataset_prepared_path", "preprocessing_num_workers", "overwrite_cache", "dataset_processes", "dataset_num_proc", "preprocess_shared_cache"), (LF, AX, TRL), "nothing: sources are read in place and fingerprinted"),
        Foreign(("dataset_config_name", "dataset_split", "split"), (HF, AX, TT), "data: {mine: {hub: name, args: {split: train}}}"),
        Foreign(("dataset_text_field", "text_column", "field_messages", "column", "content_key"), (TRL, AX, TT), "data: {mine: {path: x.jsonl, field: text}}", "found by itself when left out"),
        Foreign(("val_set_size", "val_size", "validation_split_percentage"), (AX, LF, HF), "data: {mine: {path: x.jsonl, val: 1%}}"),
        Foreign(("validation_file", "test_datasets", "eval_dataset", "eval_dataset_path"), (HF, AX, LF), "data: {mine: {path: x.jsonl, val: heldout.jsonl}}"),
        Foreign(("mix_strategy", "interleave_probs", "dataset_sampling_ratio", "probabilities"), (LF, HF), "data: {a: {path: a.jsonl, weight: 0.7}, b: {path: b.jsonl, weight: 0.3}}"),
        Foreign(("chat_template", "template", "conversation", "chat_template_jinja", "prompt_template"), (AX, LF, TT), "data: {chat: {path: x.jsonl, template: chat}}", "the tokenizer's own template renders `messages`"),
        Foreign(("train_on_inputs", "train_on_prompt", "roles_to_train", "completion_only_loss", "assistant_only_loss", "mask_history"), (AX, LF, TRL, TT), "objective: {use: align/sft, prompt_weight: 0}", "only what the assistant says is learned"),
        Foreign(("disable_shuffling", "shuffle_merged_datasets"), (LF, AX), "data: {mine: {path: x.jsonl, order: stored}}", "each source in its own order, as the mix draws it"),
        Foreign(("max_samples", "max_train_samples", "streaming", "buffer_size"), (LF, HF, AX), "nothing: order is arithmetic over the whole source; `until: 1000sample` ends early"),
        Foreign(("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "remove_unused_columns"), (HF, AX, LF), "nothing: rows are made as they are needed"),
    ),
    "What is trained": (
        Foreign(("adapter", "finetuning_type", "use_peft", "peft_config", "lora_config"), (AX, LF, TRL), "methods: [{use: param/lora, r: 16}]"),
        Foreign(("lora_r", "lora_rank", "lora_attn_modules"), (AX, LF, TT, TRL), "methods: [{use: param/lora, r: 16}]"),
        Foreign(("lora_alpha",), (AX, LF, TT, TRL), "methods: [{use: param/lora, r: 16, alpha: 32}]"),
        Foreign(("lora_dropout",), (AX, LF, TT, TRL), "methods: [{use: param/lora, r: 16, dropout: 0.05}]"),
        Foreign(("lora_target_modules", "lora_target", "lora_target_linear", "target_modules"), (AX, LF, TRL), "methods: [{use: param/lora, r: 16, targets: ['*_proj']}]"),
        Foreign(("use_dora", "peft_use_dora", "lora_use_dora"), (AX, LF, TRL), "nothing yet: param/lora is the plain one"),
        Foreign(("lora_modules_to_save", "additional_target", "modules_to_save", "unfrozen_parameters", "freeze_trainable_layers", "freeze_trainable_modules"), (AX, LF, TRL), "train: ['*lm_head*', '*embed*']", "name patterns; the rest is frozen"),
        Foreign(("load_in_4bit", "quantization_bit", "qlora", "bnb_4bit_quant_type", "quantization_type"), (AX, LF, HF), "engine: {quantize: nf4}", "frozen linear weights in four bits beside `param/lora`; `fp4` too, eight bits not"),
        Foreign(("bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "double_quantization"), (HF, LF), "nothing: `engine: {quantize: nf4}` computes in the stage's precision and always quantizes twice"),
        Foreign(("load_in_8bit", "gptq", "quantization_method", "quantization_device_map"), (AX, LF, HF), "nothing yet: base weights are held in four bits by bitsandbytes (`engine: {quantize: nf4}`), or whole"),
        Foreign(("stage",), (LF,), "objective: align/sft", "`pt` is objective/causal_lm, `sft` is align/sft; `tutelage methods` lists all"),
        Foreign(("rl", "rlhf", "pref_loss", "loss_type"), (AX, LF, TRL), "nothing yet: no preference objective is built in"),
        Foreign(("pref_beta", "rl_beta", "beta", "dpo_beta"), (LF, AX, TRL), "nothing yet: no preference objective is built in"),
        Foreign(("neftune_noise_alpha", "noisy_embedding_alpha"), _ALL, "nothing yet: embeddings are not noised"),
        Foreign(("label_smoothing_factor",), (HF, LF), "nothing yet: labels are not smoothed"),
    ),
    "Precision and engine": (
        Foreign(("bf16", "bf16_full_eval", "dtype", "torch_dtype"), (*_ALL, TT), "precision: bf16"),
        Foreign(("fp16", "float16", "fp8", "tf32", "pure_bf16"), (*_ALL, NC), "precision: auto", "bf16 where the hardware has it, else fp32; fp16 and fp8 are not offered"),
        Foreign(("gradient_checkpointing", "disable_gradient_checkpointing", "enable_activation_checkpointing", "activation_checkpointing"), (*_ALL, TT), "engine: {checkpointing: true}"),
        Foreign(("torch_compile", "torch_compile_backend", "torch_compile_mode"), (HF, AX), "engine: {compile: true}"),
        Foreign(("full_determinism",), (HF,), "engine: {deterministic: true}", "the default"),
        Foreign(("flash_attention", "flash_attn", "xformers_attention", "sdp_attention", "attn_implementation", "eager_attention"), (AX, LF, HF), "nothing: torch's own attention, with a mask between packed documents"),
        Foreign(("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "ddp_timeout", "ddp_find_unused_parameters", "tensor_parallel_size"), _ALL, "nothing in the recipe: sharding follows from how many processes `torchrun` starts"),
        Foreign(("use_cpu", "no_cuda", "device_type", "device", "device_map"), (HF, TT, NC), "engine: {device: cpu}"),
        Foreign(("use_liger_kernel", "enable_liger_kernel", "liger_fused_linear_cross_entropy", "use_unsloth"), (HF, AX, LF), "nothing: logits are never whole, here by chunks"),
    ),
    "Saving and measuring": (
        Foreign(("output_dir", "output_directory", "run_name", "model_tag"), (*_ALL, TT, NC), "nothing in the recipe: runs/<recipe>/<stage>/<n>/", "`--runs` of `tutelage run` moves the folder"),
        Foreign(("overwrite_output_dir", "hub_model_id", "push_to_hub", "hub_strategy"), _ALL, "nothing: every artifact's `model/` is a Hugging Face folder, and old ones are kept"),
        Foreign(("save_steps", "save_strategy", "saves_per_epoch", "save_every"), (*_ALL, NC), "save: {every: 500step}"),
        Foreign(("save_total_limit",), _ALL, "save: {keep: 2}"),
        Foreign(("save_safetensors", "save_only_model"), (HF, AX, LF), "nothing: safetensors always"),
        Foreign(("eval_steps", "eval_strategy", "evaluation_strategy", "evals_per_epoch", "eval_every", "do_eval"), (*_ALL, NC), "evals: {every: 100step}"),
        Foreign(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), (HF, LF), "start: {best: [a, b], by: mean}", "picks among stages"),
        Foreign(("early_stopping_patience", "early_stopping_threshold"), (AX, HF), "nothing yet: `until` says where a stage ends"),
        Foreign(("logging_steps", "logging_strategy", "logging_dir", "log_every_n_steps", "plot_loss", "disable_tqdm"), (*_ALL, TT), "nothing: every step is written to metrics.jsonl"),
        Foreign(("report_to", "metric_logger", "use_tensorboard"), (HF, LF, TT), "report_to: [wandb]", "beside `stages`"),
        Foreign(("wandb_project", "wandb_run_id", "wandb_name", "wandb_entity", "use_swanlab", "mlflow_tracking_uri"), (AX, LF), "report_to: [wandb]", "beside `stages`; the project is W&B's own setting"),
        Foreign(("seed", "data_seed"), _ALL, "seed: 0", "beside `stages`, or in one stage"),
        Foreign(("do_train", "do_predict"), (HF, LF), "nothing: a stage with `until` trains"),
    ),
}
# fmt: on

TABLE: dict[str, Foreign] = {name: entry for group in GROUPS.values() for entry in group for name in entry.names}


def explain_foreign(key: str) -> str:
    """` (Hugging Face); here: …` for a name that another system uses, else the empty string."""
    entry = TABLE.get(key.lower().replace("-", "_"))
    if not entry:
        return ""
    remark = f" ({entry.remark})" if entry.remark else ""
    return f" ({', '.join(entry.systems)}); here: {entry.here}{remark}"


def page() -> str:
    """docs/coming-from.md."""
    lines = [
        "# Coming from another system",
        "",
        "What the settings of Hugging Face's `TrainingArguments`, TRL, Axolotl, LLaMA-Factory, torchtune and nanochat",
        "are called here. A recipe that uses one of these names is refused with the same answer.",
        "",
        "<!-- made by `python -m tutelage.base.foreign`; edit the table there -->",
    ]
    for title, entries in GROUPS.items():
        lines += ["", f"## {title}", "", "| there | said by | here | |", "|---|---|---|---|"]
        for entry in entries:
            names = ", ".join(f"`{name}`" for name in entry.names)
            nothing = entry.here.startswith("nothing")
            here = entry.here if nothing else f"`{entry.here}`"
            lines.append(f"| {names} | {', '.join(entry.systems)} | {here} | {entry.remark} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
