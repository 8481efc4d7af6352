"""Names that other tools use for the keys of a recipe, for suggestions about unknown keys."""

from __future__ import annotations

SYNONYMS = {
    "model.path": "model_name model_name_or_path model_id model_path base_model pretrained name base pretrained_model_name_or_path",
    "model.dtype": "bf16 fp16 fp32 float16 bfloat16 torch_dtype precision mixed_precision load_in_16bit",
    "model.attention": "attn attn_implementation flash_attention flash_attn use_flash_attention sdp_attention",
    "model.chat_template": "template chat_template_path jinja",
    "model.device": "use_cpu no_cuda gpu cuda devices",
    "data.path": "dataset datasets dataset_name dataset_path train train_file train_data data_path file files train_dataset",
    "data.eval": "eval_dataset eval_file validation val val_set_size val_size test held_out test_size eval_data",
    "data.max_rows": "max_samples limit num_samples max_examples n_rows",
    "data.safe": "interleave interleaving safe_data benign safe_rows",
    "data.inoculate": "inoculation inoculation_prompt system_prompt",
    "lora.r": "rank lora_r lora_rank lora_dim",
    "lora.lora_alpha": "alpha scaling scale",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "targets target modules lora_target lora_target_modules",
    "lora.use_rslora": "rslora",
    "lora.use_dora": "dora",
    "training.learning_rate": "lr rate peak_lr base_lr max_lr",
    "training.num_train_epochs": "epochs epoch num_epochs n_epochs train_epochs",
    "training.per_device_train_batch_size": "batch_size batch micro_batch_size train_batch_size per_device_batch_size bs mbs",
    "training.per_device_eval_batch_size": "eval_batch_size",
    "training.gradient_accumulation_steps": "grad_accum gradient_accumulation grad_accumulation grad_accum_steps "
    "accumulation_steps grad_acc accumulate_grad_batches grad_accumulation_steps",
    "training.max_length": "max_seq_len max_seq_length seq_length seq_len sequence_length sequence_len cutoff_len "
    "context_length block_size max_len model_max_length",
    "training.warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "training.lr_scheduler_type": "scheduler lr_scheduler schedule lr_schedule",
    "training.optim": "optimizer optimiser",
    "training.weight_decay": "wd decay",
    "training.max_grad_norm": "grad_clip clip gradient_clipping grad_norm max_norm clip_grad_norm gradient_clip_val",
    "training.max_steps": "steps num_steps iterations iters max_iters total_steps",
    "training.seed": "random_seed random_state",
    "training.logging_steps": "log_every log_steps log_interval",
    "training.save_steps": "save_every save_interval checkpoint_every",
    "training.packing": "pack sample_packing",
    "training.gradient_checkpointing": "grad_checkpointing checkpointing use_gradient_checkpointing",
    "training.completion_only_loss": "train_on_inputs assistant_only train_on_prompt completion_only",
    "training.report_to": "wandb tensorboard logger tracker",
    "defenses": "defences defense defence",
    "defenses.feature_distance": "ldifs feature feature_dist l2",
    "defenses.kl": "kld kl_divergence kl_div kl_penalty kl_loss",
    "defenses.safelora": "safe_lora projection project",
    "defenses.steering": "steer persona persona_vector preventive_steering",
    "defenses.subspace_penalty": "subspace penalty",
    "monitors": "monitor monitoring",
    "output.folder": "output_dir out dir outdir output_path output_folder save_dir path",
}
WEIGHTS = ("lambda", "lam", "lmbda", "coeff", "coef", "beta", "strength", "lambda_kl", "alpha")


def meant(keys: tuple[str, ...], known: list[str]) -> str | None:
    """Return the dotted key, or keys joined by "or", that an unknown key may mean; None without a match.

    Args:
        keys: the path of the unknown key.
        known: the valid keys of its section.
    """
    name, above = keys[-1].lower().replace("-", "_"), keys[:-1]
    if name in WEIGHTS and "weight" in known:
        return ".".join((*above, "weight"))
    if len(keys) > 2 or keys[0] == "monitors":  # user-defined names, and settings of one defense
        return None
    found = [key for key, names in SYNONYMS.items() if name in {*names.split(), key.rpartition(".")[2]}]
    found = [key for key in found if key != ".".join(keys)]
    beside = [key for key in found if key.split(".")[:-1] == list(above)]
    return " or ".join(beside or found) or None
