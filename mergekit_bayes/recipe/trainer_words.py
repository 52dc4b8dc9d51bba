"""Words of other trainers' configurations (transformers, TRL, PEFT, axolotl, torchtune), and what to write here.

Words that another section of a recipe has under the same name are not listed: that section is found by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_HERE: Mapping[str, str] = {
    # model
    "`model`, or `model.path` beside other keys": """
        model_name_or_path model_name model_id model_path base_model base_model_name_or_path hf_model checkpoint
        pretrained_model_name_or_path pretrained_model base_model_name pretrained""",
    "a key of `model`": "model_init_kwargs model_kwargs model_args",
    "part of the path: `path@revision`": "model_revision revision dataset_revision commit",
    "`model.dtype`": "torch_dtype model_dtype base_dtype compute_dtype weights_dtype",
    "`model.task`": "task_type lora_task_type task_name problem_type auto_class",
    "`model.attn_implementation`, such as `flash_attention_2`": """
        use_flash_attention use_flash_attention_2 flash_attention flash_attention_2 flash_attn use_flash_attn
        sdp_attention sdpa_attention eager_attention xformers_attention attention_implementation attn_impl attention""",
    "`model.load_in_4bit`": "load_in_4_bit use_4bit bits quantization_bit quantize qlora",
    "`model.load_in_8bit`": "load_in_8_bit use_8bit",
    "`model.load_in_4bit` or `model.load_in_8bit`": "quantization_config quantization bnb_config bitsandbytes",
    "`model.bnb_4bit_quant_type`": "quant_type bnb_quant_type",
    "`model.bnb_4bit_use_double_quant`": "use_nested_quant use_bnb_nested_quant double_quant",
    "`model.bnb_4bit_compute_dtype`": "bnb_compute_dtype",
    # adapter
    "`adapter`": "peft peft_config lora lora_config use_peft use_lora lora_on",
    "`adapter.r`": "lora_r lora_rank rank lora_dim",
    "`adapter.lora_alpha`": "alpha lora_scale scaling",
    "`adapter.lora_dropout`": "dropout",
    "`adapter.target_modules`": "lora_target_modules target_module lora_target lora_modules lora_attn_modules",
    "`adapter.target_modules: all-linear`": "lora_target_linear",
    "`adapter.modules_to_save`": "lora_modules_to_save additional_trainable_modules",
    "`adapter.use_rslora`": "use_rs_lora rslora peft_use_rslora",
    "`adapter.init_lora_weights`": "peft_init_lora_weights init_weights",
    "`adapter.layers_to_transform`": "peft_layers_to_transform lora_layers",
    # data
    "`data.train`": """
        dataset datasets dataset_name dataset_names dataset_path data_path data_files data_file train_file train_files
        train_data train_dataset train_datasets train_path training_data training_file dataset_mixer""",
    "`data.eval`": """
        validation_file validation_files validation validation_data validation_dataset valid val valid_data val_data
        val_dataset eval_file eval_files eval_data eval_dataset eval_datasets eval_path test test_data test_file
        test_dataset test_datasets dev dev_data heldout""",
    "`name` in an entry of `data.train`": "dataset_config_name dataset_config config_name config subset dataset_subset",
    "`split` in an entry of `data.train`": "dataset_split train_split dataset_train_split train_on_split",
    "`split` in an entry of `data.eval`": "eval_split dataset_test_split validation_split_name test_split",
    "`format` in an entry of `data.train`": "dataset_format ds_type data_format",
    "`columns` in an entry of `data.train`, such as `columns: {text: body}`": """
        dataset_text_field text_field text_column text_column_name text_key input_column prompt_column prompt_field
        prompt_key completion_column completion_field response_column response_template answer_column label_column
        label_column_name label_field label_key label_names messages_column messages_field field_messages field
        column_map column_mapping column_names field_instruction field_output remove_columns
        sentence1_key sentence2_key""",
    "`weight` in an entry of `data.train`": """
        mixture mixture_weights probabilities dataset_weights sampling_weights interleave_probs interleave_probabilities
        mix_strategy proportion sampling_prob""",
    "`max_rows` in an entry of `data.train`": """
        max_train_samples max_samples num_samples limit max_examples num_examples train_samples shards n_rows""",
    "`max_rows` in an entry of `data.eval`": "max_eval_samples eval_samples eval_limit",
    "`data.eval_fraction`": """
        validation_split validation_split_percentage val_set_size val_size test_size eval_size eval_ratio dev_size
        test_split_size eval_split_ratio validation_fraction""",
    "`data.max_length`": """
        max_seq_length max_seq_len sequence_len sequence_length seq_len seq_length cutoff_len block_size
        model_max_length context_length max_len max_tokens max_prompt_length max_completion_length max_context""",
    "`data.long_rows`": "truncation truncation_mode truncate excess_length_strategy overflow",
    "`data.packing`": "sample_packing pack pack_sequences packed group_texts packing_strategy eval_packing",
    "`data.completion_only_loss`": """
        assistant_only_loss completions_only completion_only mask_prompt mask_prompts
        response_only train_on_completions_only train_on_responses_only roles_to_train""",
    "`data.completion_only_loss`, the other way round": "train_on_inputs train_on_input train_on_source",
    "`data.append_eos`": "add_eos_token add_eos append_eos_token train_on_eos",
    "`data.chat_template`": "chat_template_path chat_template_jinja chat_template_file conversation_template template",
    "`data.labels`": "num_labels num_classes id2label label2id classes class_names label_list n_labels",
    # optimizer
    "`optimizer.lr`": "learning_rate peak_lr base_lr max_lr lr_max step_size",
    "`optimizer.name`": "optim optimizer_name optim_name optimizer_type optim_type",
    "`optimizer.weight_decay`": "wd decay l2",
    "`optimizer.beta1`": "adam_beta1 beta_1 momentum",
    "`optimizer.beta2`": "adam_beta2 beta_2 momentum_hess hess_beta beta2_hess",
    "`optimizer.beta1` and `optimizer.beta2`": "betas adam_betas",
    "`optimizer.eps`": "adam_epsilon adam_eps epsilon",
    "`optimizer`": "optim_args optimizer_kwargs optimizer_args optim_kwargs",
    "`optimizer.ess`": "effective_sample_size lambda lam num_data n_data dataset_size",
    "`optimizer.hess_init`": "h0 hessian_init hess_0 init_hess hess_start hess0 hessian_initial",
    "`optimizer.clip_radius`": "clip clip_value xi hess_clip",
    "`optimizer.mc_samples`": "mc mc_sample num_mc_samples samples_per_step",
    # training
    "`training.num_train_epochs`": "epochs epoch num_epochs n_epochs max_epochs train_epochs",
    "`training.max_steps`": """
        steps train_steps total_steps num_steps num_train_steps num_training_steps max_train_steps max_iters iters""",
    "`training.per_device_train_batch_size`": """
        batch_size bs train_batch_size per_device_batch_size per_device_batch per_gpu_train_batch_size
        per_gpu_batch_size micro_batch_size mini_batch_size train_micro_batch_size_per_gpu device_batch_size""",
    "`training.per_device_eval_batch_size`": """
        eval_batch_size per_gpu_eval_batch_size val_batch_size micro_eval_batch_size""",
    "`training.gradient_accumulation_steps`": """
        gradient_accumulation grad_accum grad_accum_steps grad_accumulation_steps accumulation_steps accum_steps
        accumulate_grad_batches""",
    "`training.lr_scheduler_type`": "lr_scheduler scheduler schedule lr_schedule scheduler_type lr_scheduler_name",
    "`training.lr_scheduler_kwargs`": "scheduler_kwargs lr_scheduler_args",
    "`training.lr_scheduler_kwargs.min_lr_rate`": "min_lr_rate min_lr min_lr_ratio lr_end cosine_min_lr_ratio",
    "`training.warmup_steps`, which below 1 is a share of all steps": """
        warmup_ratio warmup warmup_fraction num_warmup_steps warmup_proportion lr_warmup_steps""",
    "`training.max_grad_norm`": """
        max_norm clip_grad clip_grad_norm grad_clip gradient_clip_val gradient_clipping gradient_clip grad_norm""",
    "`training.bf16` or `training.fp16`": """
        mixed_precision half_precision_backend use_bf16 use_fp16 amp autocast fp16_opt_level bfloat16 float16""",
    "`training.gradient_checkpointing`": """
        activation_checkpointing use_gradient_checkpointing enable_activation_checkpointing checkpointing""",
    "`training.eval_steps`": """
        eval_strategy evaluation_strategy eval_every evals_per_epoch eval_interval eval_freq do_eval eval_on_start
        eval_delay run_eval""",
    "`training.save_steps`": """
        save_strategy save_every saves_per_epoch save_interval checkpoint_steps checkpointing_steps save_freq
        checkpoint_every save_epochs""",
    "`training.save_total_limit`": "keep_checkpoints max_checkpoints save_limit keep_last_n_checkpoints",
    "`training.logging_steps`": """
        logging_strategy log_steps log_every log_interval log_freq logging_interval logging_first_step
        log_every_n_steps""",
    "`training.seed`": "random_seed manual_seed torch_seed",
    "`training.data_seed`": "shuffle_seed sampler_seed",
    "`training.resume_from_checkpoint`": """
        resume resume_from resume_checkpoint auto_resume_from_checkpoints ignore_data_skip""",
    "`training.report_to`": """
        trackers tracker log_with loggers logger wandb use_wandb wandb_project tensorboard mlflow metric_logger
        wandb_run_id""",
    "`training.dataloader_num_workers`": "num_workers dataset_num_proc preprocessing_num_workers",
    # output
    "`output.path`": "output_dir out_dir save_dir output_folder output_path out save_path save_to checkpoint_dir",
    "the option `--overwrite` of the command": "overwrite_output_dir overwrite force",
    "the option `--quiet` of the command": "disable_tqdm log_level log_level_replica verbose quiet",
    "`output.precision`": "sidecar save_precision precision_dtype",
    "`output.debias_precision`": "debiased debias_hess debias_hessian",
}
"""Where the recipe has it: words."""

_REFUSED: Mapping[str, str] = {
    "the precision belongs to the weights of the last step; keep checkpoints with `training.save_steps` and compare "
    "them": """
        load_best_model_at_end metric_for_best_model greater_is_better early_stopping early_stopping_patience
        early_stopping_threshold save_best""",
    "only plain LoRA is trained, whose updates a merge can add": """
        use_dora dora peft_use_dora lora_bias use_qalora qalora_group_size loftq_config eva_config corda_config
        lora_ga_config velora_config kasa_config monteclora_config arrow_config use_bdlora alora_invocation_tokens
        layer_replication megatron_config megatron_core target_parameters lora_target_parameters
        trainable_token_indices ensure_weight_tying
        use_vera use_dylora use_oft ia3 prompt_tuning lora_plus lora_plus_lr_ratio loraplus_lr_ratio""",
    "an adapter is always a new LoRA adapter; remove it": """
        peft_type inference_mode auto_mapping peft_version runtime_config adapter_type is_trainable""",
    "code that comes with a model or a data set is never run; remove it": "trust_remote_code",
    "`accelerate launch` says which devices a run uses, and how; remove it": """
        device device_map devices max_memory low_cpu_mem_usage use_cpu no_cuda use_mps_device n_gpu num_gpus num_nodes
        deepspeed deepspeed_config fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap local_rank parallelism_config
        accelerator_config ddp_backend ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters
        ddp_static_graph ddp_timeout tensor_parallel sequence_parallel_degree context_parallel_size
        log_on_each_node save_on_each_node average_tokens_across_devices""",
    "nothing is uploaded; use `hf upload` on the output": """
        push_to_hub push_to_hub_model_id hub_model_id hub_token hub_strategy hub_private_repo hub_always_push
        hub_revision token use_auth_token hf_token""",
    "the loss is the negative log-likelihood of the data, which is what a precision belongs to; remove it": """
        label_smoothing_factor label_smoothing neftune_noise_alpha noisy_embedding_alpha loss_type loss_fn loss
        router_aux_loss_coef class_weights""",
    "only supervised fine-tuning is trained": """
        ref_model reference_model reward_model reward_funcs rl dpo orpo kto beta dpo_beta num_generations teacher_model
        desirable_weight""",
    "what a step learns would depend on the machine; set `training.per_device_train_batch_size`": """
        auto_find_batch_size""",
    "rows are always shuffled, by `training.data_seed`; remove it": """
        shuffle shuffle_dataset shuffle_buffer_size train_sampling_strategy group_by_length length_column_name
        sampler curriculum_sampling""",
    "data sets are read as a whole; limit them with `max_rows`": "streaming dataset_streaming stream iterable",
    "the tokenizer is the model's own; remove it": """
        tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_type use_fast use_fast_tokenizer
        padding_side eos_token pad_token bos_token special_tokens add_special_tokens tokens processing_class
        resize_token_embeddings added_tokens_overrides""",
    "there is no need for it; remove it": """
        do_train do_predict remove_unused_columns prediction_loss_only use_cache tf32 torch_compile
        torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config torch_empty_cache_steps
        bf16_full_eval fp16_full_eval eval_accumulation_steps eval_do_concat_batches eval_use_gather_object
        batch_eval_metrics include_for_metrics include_num_input_tokens_seen include_tokens_per_second
        logging_nan_inf_filter logging_dir run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
        save_only_model save_safetensors enable_jit_checkpoint restore_callback_states_from_checkpoint
        full_determinism skip_memory_metrics debug dataloader_drop_last dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
        dataloader_in_order gradient_checkpointing_kwargs activation_checkpointing_kwargs activation_offloading
        optim_target_modules bnb_4bit_quant_storage llm_int8_threshold llm_int8_skip_modules
        llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight quant_method ignore_bias_buffers strict
        dataset_prepared_path dataset_kwargs num_of_sequences
        pad_to_multiple_of padding_free pad_to_sequence_len eval_sample_packing merge_adapter merge_lora""",
    "recipes of kind `merge` have it": """
        merge_method models slices modules parameters out_dtype space scale normalize density tokenizer_source""",
}
"""Why there is nothing like it: words."""

BY_PLACE: Mapping[tuple[str, str], str] = {
    ("data", "type"): "`format` in an entry of `data.train`",
    ("data", "files"): "`path` in an entry of `data.train`",
    ("data", "file"): "`path` in an entry of `data.train`",
    ("data", "config"): "`name` in an entry of `data.train`",
    ("model", "name"): "`model.path`",
    ("model", "id"): "`model.path`",
    ("model", "model"): "`model.path`",
    ("model", "type"): "`model.task`",
    ("optimizer", "type"): "`optimizer.name`",
    ("optimizer", "optimizer"): "`optimizer.name`",
    ("optimizer", "delta"): "`optimizer.weight_decay`",
    ("output", "dir"): "`output.path`",
    ("output", "folder"): "`output.path`",
    ("output", "dtype"): "`output.precision` for the sidecar; weights are written as they are trained",
    ("training", "checkpoint"): "`training.resume_from_checkpoint`",
}
"""Words that mean different things in different sections: (section, word) -> where the recipe has it."""


def _words(table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    return ((word, meaning) for meaning, words in table.items() for word in words.split())


HERE: Mapping[str, str] = dict(_words(_HERE))
"""Word -> what the recipe calls it."""

REFUSED: Mapping[str, str] = dict(_words(_REFUSED))
"""Word -> why it is not supported."""


def about_word(section: str, word: str) -> str | None:
    """What to do about a key of other trainers, as one sentence; None for a word that is not known.

    Args:
        section: the name at the top of the recipe it was written under; empty for the top itself.
        word: the key.
    """
    here = BY_PLACE.get((section, word)) or HERE.get(word)
    if here is not None:
        return f"unknown key. Here it is {here}."
    reason = REFUSED.get(word)
    return None if reason is None else f"not supported: {reason}."
