"""Names that users of other programs type, with the key here or the reason why there is none.

They are for messages alone: a setting has one name, and where two programs call different things by
one name (a batch for each device, a batch for all) taking it silently would train another model.
The names are those of the trainers of transformers and TRL, axolotl, LLaMA-Factory, Unsloth,
torchtune, Lightning and nanoGPT.
"""

from collections.abc import Mapping

from smbfast.base.nearest import Foreign

# key, what differs, names: one line for each key and meaning
_Rows = tuple[tuple[str, str, str], ...]


def _table(*groups: _Rows) -> Mapping[str, Foreign]:
    return {
        name: Foreign(key, why)
        for rows in groups
        for key, why, names in rows
        for name in names.split()
    }


_PHASES: _Rows = (
    ("phases.*.lr", "the peak of each phase", "lr learning_rate peak_lr max_lr base_lr lr_max"),
    (
        "phases.*.steps",
        "the optimizer steps of each phase",
        "steps max_steps num_steps train_steps num_train_steps max_train_steps total_steps "
        "training_steps iterations max_iters num_iterations",
    ),
    (
        "phases.*.epochs",
        "in place of the steps of the phase",
        "epochs epoch num_epochs num_train_epochs max_epochs n_epochs train_epochs",
    ),
    (
        "phases.*.warmup",
        "a number of steps",
        "warmup warmup_steps num_warmup_steps lr_warmup_steps warmup_iters",
    ),
    (
        "phases.*.warmup",
        "a number of steps and not a share",
        "warmup_ratio warmup_fraction lr_warmup_ratio warmup_proportion",
    ),
    ("phases.*.w_sft", "", "sft_weight lambda_sft ntp_weight lm_loss_weight"),
    ("phases.*.w_jepa", "", "jepa_weight lambda_jepa jepa_loss_weight"),
)
_OPTIM: _Rows = (
    (
        "optim.batch",
        "the windows of a whole step, of all GPUs and micro-batches together",
        "batch_size train_batch_size global_batch_size total_batch_size effective_batch_size bs "
        "global_batch gbs",
    ),
    (
        "optim.micro_tokens",
        "counted in tokens; a step of all GPUs has optim.batch windows",
        "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size device_batch_size "
        "train_micro_batch_size_per_gpu mbs micro_batch per_device_eval_batch_size eval_batch_size "
        "val_batch_size max_tokens_per_batch",
    ),
    (
        "optim.batch",
        "the windows of a step; how many micro-batches they take follows from optim.micro_tokens",
        "gradient_accumulation_steps gradient_accumulation grad_accum grad_accum_steps "
        "accumulate_grad_batches grad_accumulation_steps accumulation_steps",
    ),
    ("optim.weight_decay", "", "wd"),
    (
        "optim.clip",
        "the norm above which a gradient is scaled down",
        "max_grad_norm max_norm grad_clip gradient_clip gradient_clip_val gradient_clipping "
        "clip_grad clip_grad_norm grad_norm_clip",
    ),
    ("optim.betas", "two numbers", "adam_beta1 adam_beta2 adam_betas beta1 beta2"),
    (
        "optim.min_lr",
        "a share of the peak, to which the rate always falls along a cosine",
        "min_lr min_learning_rate lr_min min_lr_ratio min_lr_rate cosine_min_lr_ratio eta_min "
        "lr_scheduler lr_scheduler_type lr_schedule scheduler lr_decay_style lr_decay",
    ),
    ("", "the optimizer is always AdamW; see the group optim", "optim optimizer optim_args"),
    ("", "AdamW's epsilon is fixed", "adam_epsilon epsilon eps adam_eps"),
)
_RUN: _Rows = (
    (
        "run.dir",
        "the folder of the run",
        "output_dir out_dir outdir out output output_path save_dir save_path default_root_dir "
        "checkpoint_dir logging_dir log_dir work_dir run_name experiment_name exp_name name run "
        "overwrite_output_dir",
    ),
    (
        "run.seed",
        "that of the simulated cohort is cohort.seed",
        "seed random_seed random_state manual_seed data_seed",
    ),
    ("run.device", "", "device use_cpu no_cuda cpu device_map accelerator gpu_id"),
    ("run.threads", "", "num_threads threads"),
    (
        "run.log_every",
        "",
        "logging_steps log_interval log_every log_steps log_freq log_every_n_steps",
    ),
    (
        "run.save_every",
        "",
        "save_steps save_interval save_every save_freq save_strategy checkpoint_every ckpt_every "
        "ckpt_interval checkpointing_steps checkpoint_interval",
    ),
    (
        "run.keep",
        "",
        "save_total_limit keep_last max_checkpoints save_top_k keep_checkpoints keep_last_n",
    ),
    (
        "run.resume",
        "auto by itself: the same command goes on from the newest checkpoint",
        "resume resume_from_checkpoint resume_from resume_path ckpt_path load_checkpoint "
        "auto_resume_from_checkpoints init_from",
    ),
    ("run.export", "merged writes a plain model at the end", "merge merge_lora save_merged export"),
    ("run.profile", "", "profiler profile"),
    (
        "run.track",
        "wandb, mlflow or both; metrics.jsonl and TensorBoard files are always written",
        "report_to logger use_wandb wandb wandb_project wandb_run_name use_tensorboard tracker "
        "with_tracking use_mlflow mlflow",
    ),
    (
        "",
        "the command `smbfast check` takes the same words and tries what the run would do",
        "dry_run debug fast_dev_run do_check",
    ),
    ("", "the log has one line each run.log_every steps", "verbose disable_tqdm log_level quiet"),
    (
        "",
        "training embeds, probes and reports by itself; other work has a command of its own, "
        "see `smbfast --help`",
        "do_train do_eval do_predict do_test stage mode",
    ),
    ("", "a preset or a TOML file stands first: train run.toml", "config config_file config_path"),
    (
        "",
        "`smbfast push RUN/final --to=owner/name` sends a trained model",
        "push_to_hub hub_model_id hub_token hub_private_repo",
    ),
)
_EVAL: _Rows = (
    (
        "eval.every",
        "a number of optimizer steps",
        "eval_steps eval_interval eval_every eval_freq eval_strategy evaluation_strategy "
        "val_check_interval validation_steps val_interval",
    ),
    ("eval.windows", "", "eval_iters eval_batches max_eval_samples limit_val_batches eval_samples"),
    (
        "",
        "the best model of each phase, by its loss on tuning, is always in best/<phase>",
        "load_best_model_at_end metric_for_best_model early_stopping early_stopping_patience "
        "patience greater_is_better",
    ),
    (
        "probe.labels",
        "",
        "labels tasks task label_names label label_path labels_dir task_name",
    ),
)
_DATA: _Rows = (
    (
        "data.path",
        "the folder of a MEDS dataset",
        "data dataset datasets dataset_name dataset_path dataset_dir data_path data_dir train_file "
        "train_data train_data_path train_dataset train_files meds meds_dir meds_path input "
        "input_dir input_path",
    ),
    (
        "data.split",
        "for a dataset without splits; otherwise those of the dataset hold",
        "val_size test_size validation_split val_split train_test_split split splits val_set_size "
        "validation_file eval_file val_file eval_dataset eval_data test_file val_data",
    ),
    (
        "data.window",
        "the context length in tokens",
        "max_length max_seq_length max_seq_len max_len block_size cutoff_len sequence_len seq_len "
        "seq_length sequence_length max_sequence_length model_max_length context_length "
        "context_window context_size n_ctx ctx_len max_position_embeddings max_tokens",
    ),
    (
        "data.workers",
        "processes that prepare the data; loading during training needs none",
        "num_workers dataloader_num_workers dataset_num_proc preprocessing_num_workers num_proc",
    ),
    ("data.prepared", "", "dataset_prepared_path prepared_path cache_dir tokenized_path shards"),
    (
        "",
        "windows are always packed into rows, without padding; optim.micro_tokens is the length of "
        "a row",
        "packing pack sample_packing eval_packing eval_sample_packing group_by_length "
        "pad_to_max_length pad_to_sequence_len padding padding_free padding_side",
    ),
    ("cohort.patients", "", "n_patients num_patients"),
)
_MODEL: _Rows = (
    (
        "model.path",
        "a folder or hub name",
        "model model_name model_name_or_path model_path model_id base_model backbone pretrained "
        "pretrained_model pretrained_model_name_or_path hf_model checkpoint base_model_name",
    ),
    (
        "model.path",
        "whose tokenizer comes with it",
        "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path",
    ),
    (
        "model.adapter",
        "the folder of a LoRA adapter with which training goes on",
        "adapter adapter_path adapter_name_or_path lora_path lora_weights lora_model_dir "
        "peft_model_id peft_path",
    ),
    (
        "model.train",
        "lora or all",
        "finetuning_type use_lora use_peft peft peft_type full_finetuning full_finetune "
        "freeze_backbone train_type",
    ),
    (
        "model.dtype",
        "float32, bfloat16 or auto; float16 is not offered",
        "bf16 fp16 fp32 precision dtype torch_dtype mixed_precision half amp bfloat16 float16",
    ),
    (
        "model.dtype",
        "float32, bfloat16 or auto; no backbone is quantized",
        "load_in_4bit load_in_8bit quantization quantization_bit quantize bits qlora "
        "bnb_4bit_quant_type bnb_4bit_compute_dtype use_4bit",
    ),
    (
        "model.recompute",
        "none, mlp or full",
        "gradient_checkpointing activation_checkpointing use_gradient_checkpointing "
        "grad_checkpointing checkpoint_activations recompute activation_checkpoint",
    ),
    (
        "model.fsdp",
        "under torchrun; without it every GPU holds the whole backbone",
        "deepspeed deepspeed_config ds_config zero_stage zero fsdp use_fsdp fsdp_config "
        "fsdp_transformer_layer_cls_to_wrap sharding_strategy strategy",
    ),
    (
        "",
        "GPUs are given by torchrun --nproc-per-node=N -m smbfast.train",
        "num_gpus n_gpu n_gpus gpus ngpus devices num_devices num_processes nproc_per_node nproc "
        "world_size local_rank num_nodes num_machines distributed ddp ddp_backend "
        "ddp_find_unused_parameters tensor_parallel_size tensor_parallel pipeline_parallel_size",
    ),
    (
        "kernels",
        "which chooses the implementation of each operation",
        "attn_implementation flash_attention flash_attn use_flash_attention use_flash_attention_2 "
        "attention sdp_attention xformers_attention use_liger_kernel liger_kernel "
        "torch_compile compile use_compile",
    ),
    ("model.hidden", "", "hidden_size hidden_dim d_model n_embd embed_dim embedding_dim width dim"),
    ("model.layers", "", "num_hidden_layers num_layers n_layer n_layers depth"),
    ("model.heads", "", "num_attention_heads num_heads n_head n_heads"),
    ("model.kv_heads", "", "num_key_value_heads num_kv_heads n_kv_heads"),
    ("model.ffn", "", "intermediate_size ffn_dim d_ff mlp_dim ffn_hidden_size"),
    ("lora.r", "", "r rank lora_rank peft_r"),
    ("lora.alpha", "", "lora_scale"),
    (
        "lora.targets",
        "",
        "target_modules lora_target_modules lora_target lora_modules lora_target_linear",
    ),
    ("", "LoRA is plain: no DoRA, rsLoRA or biases", "use_dora use_rslora dora rslora lora_bias"),
    ("", "rows of new tokens are trained by themselves", "modules_to_save lora_modules_to_save"),
    (
        "",
        "nothing is dropped at random: both losses come from one forward",
        "dropout attention_dropout hidden_dropout resid_dropout attn_dropout",
    ),
    ("", "code of a hub repository is never run", "trust_remote_code"),
    ("", "the loss has no such term", "label_smoothing label_smoothing_factor neftune_noise_alpha"),
    ("objective.tau", "", "ema ema_decay ema_momentum momentum teacher_momentum"),
    ("objective.mask_ratio", "", "mask_prob masking_ratio mask_probability mlm_probability"),
)
TRAIN = _table(_PHASES, _OPTIM, _RUN, _EVAL, _DATA, _MODEL)

_DATASET = "dataset dataset_path dataset_dir dataset_name data_path data_dir input input_dir meds"
_MODELS = "model_name_or_path model_path model_name checkpoint ckpt ckpt_path run run_dir"
_OUT = "output output_dir output_path output_file out_dir out_file save save_path save_dir"
_TASKS = "task tasks label task_name labels_dir label_path"
PREPARE = _table(
    (
        ("path", "the folder of a MEDS dataset", f"{_DATASET} data"),
        ("out", "", _OUT),
        ("tokenizer", "", "model model_name_or_path tokenizer_name tokenizer_path model.path"),
        ("window", "the context length in tokens", _DATA[2][2]),
        ("workers", "", _DATA[3][2]),
    )
)
SIMULATE = _table(
    (
        ("patients", "", "n num n_patients num_patients size num_subjects n_subjects"),
        ("out", "", f"{_OUT} path data run.dir dir"),
        ("seed", "", "random_state random_seed cohort.seed"),
    )
)
EMBED = _table(
    (
        ("model", "the folder final of a run", _MODELS),
        ("backbone", "", "base_model base_model_name_or_path"),
        ("data", "the folder of a MEDS dataset", f"{_DATASET} data.path"),
        ("out", "a parquet file", _OUT),
        ("labels", "", f"{_TASKS} probe.labels"),
        ("at", "", "time times date dates when prediction_time index_date cutoff"),
        ("tokens", "counted in tokens", "batch_size per_device_eval_batch_size micro_tokens bs"),
        ("pool", "", "pooling pooling_mode pool_mode"),
        ("", "the context length is that of training", _DATA[2][2].replace(" max_tokens", "")),
        ("device", "", "gpu cpu use_cpu no_cuda device_map"),
    )
)
PROBE = _table(
    (
        ("embeddings", "a parquet file", "embedding embeddings_path features input"),
        (
            "data",
            "the folder of a MEDS dataset",
            f"{_DATASET.replace(' input ', ' ')} path data.path",
        ),
        ("labels", "", f"{_TASKS} probe.labels"),
        ("out", "a folder", _OUT),
        ("bootstraps", "", "n_bootstrap n_bootstraps num_bootstraps bootstrap resamples"),
        ("seed", "", "random_state random_seed"),
    )
)
REPORT = _table(
    (
        ("run", "the folder of a run", "run_dir run.dir dir path folder"),
        ("out", "the page of a comparison", "output output_file out_file save"),
    )
)
