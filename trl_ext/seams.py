"""Every private or overridden seam of TRL and transformers that trl_ext relies on, and why.

`seams.json` keeps a fingerprint of the signature and source of each in the releases that were reviewed, so that another
release that moves one is seen before it trains anything wrong. `tests/test_seams.py` compares them and finds overrides,
imports and private attributes that are missing here.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

LIBRARIES = ("trl", "transformers", "accelerate", "peft")
RECORD = Path(__file__).with_name("seams.json")

SFT = "trl.trainer.sft_trainer:SFTTrainer"
GRPO = "trl.trainer.grpo_trainer:GRPOTrainer"
DPO = "trl.trainer.dpo_trainer:DPOTrainer"
KTO = "trl.trainer.kto_trainer:KTOTrainer"
RLOO = "trl.trainer.rloo_trainer:RLOOTrainer"
REWARD = "trl.trainer.reward_trainer:RewardTrainer"
DISTILLATION = "trl.trainer.distillation_trainer:DistillationTrainer"
HF = "transformers.trainer:Trainer"

OVERRIDDEN: dict[str, str] = {
    f"{SFT}.__init__": "takes args, model, compute_loss_func and data sets under these names; checks come before it",
    f"{SFT}._prepare_dataset": "runs on an object with `_tokenizer`, `chat_template` and `completion_only_loss` alone; "
    "keeps other columns of a row, and cuts, packs and shuffles the lists of `input_ids` whatever they hold",
    f"{SFT}._set_signature_columns_if_needed": "names the columns of prepared rows that the collator gets",
    f"{SFT}.compute_loss": "sums -log_probs over the window's tokens; calls what it is given as `model`, once, fused",
    f"{SFT}.evaluate": "recurses over dict data sets, under one swap of the deployed weights",
    f"{SFT}.training_step": "accepts what transformers passes; activation offloading is around it",
    f"{SFT}._save_checkpoint": "writes the model card, then the checkpoint",
    f"{SFT}.log": "adds TRL's metrics to the logs that ours are in",
    f"{GRPO}.__init__": "as for SFT",
    f"{GRPO}._get_train_sampler": "a RepeatSampler over the rows of a map-style data set",
    f"{GRPO}._generate": "the one place where completions are drawn, whatever the back end; tools included",
    f"{GRPO}._calculate_rewards": "returns the rewards of all ranks, a column each function, NaN for None",
    f"{GRPO}._generate_and_score_completions": "returns advantages (N,) with masks, before shuffling and splitting",
    f"{GRPO}._get_per_token_logps_and_entropies": "the one forward of the loss; returns log-probs, entropies, MoE "
    "loss; called first for the old log-probabilities, where they are wanted; takes images under the batch's names",
    f"{GRPO}._compute_loss": "linear in advantages on policy; masks, reduction, KL, bonus and metrics are in it",
    f"{GRPO}.training_step": "advances `_step` once a micro-step, after the backward",
    f"{GRPO}._save_checkpoint": "writes the model card, then the checkpoint, then the state of the entropy bonus",
    f"{GRPO}.log": "adds TRL's metrics to the logs that ours are in",
    f"{DPO}.__init__": "as for SFT",
    f"{DPO}.compute_loss": "calls what it is given as `model`, fused, and leaves the division by micro-batches to "
    "transformers",
    f"{DPO}.evaluate": "prepares a data set that is passed, and computes its reference log-probabilities where they "
    "are precomputed",
    f"{DPO}.training_step": "as for SFT",
    f"{DPO}._save_checkpoint": "as for SFT",
    f"{DPO}.log": "adds TRL's metrics to the logs that ours are in",
    f"{KTO}.__init__": "as for SFT",
    f"{KTO}.compute_loss": "as for DPO; calls `model` on mismatched completions too, before",
    f"{KTO}.evaluate": "as for DPO",
    f"{KTO}.training_step": "as for SFT",
    f"{KTO}._save_checkpoint": "as for SFT",
    f"{KTO}.log": "adds TRL's metrics to the logs that ours are in",
    f"{RLOO}.__init__": "as for SFT",
    f"{RLOO}._get_train_sampler": "as for GRPO",
    f"{RLOO}._generate": "as for GRPO, without tools",
    f"{RLOO}._calculate_rewards": "as for GRPO",
    f"{RLOO}._generate_and_score_completions": "as for GRPO, with `old_logps` (N,); the batch is buffered with "
    "whatever keys it has",
    f"{RLOO}._get_per_token_logps_and_entropies": "as for GRPO; scoring computes the policy's log-probabilities, "
    "then the reference's",
    f"{RLOO}._compute_loss": "the mean over completions of a term of the ratio of sums of log-probabilities, linear "
    "in advantages on policy",
    f"{RLOO}.training_step": "advances `_step` once a micro-step, after the backward",
    f"{RLOO}._save_checkpoint": "as for SFT",
    f"{RLOO}.log": "adds TRL's metrics to the logs that ours are in",
    f"{REWARD}.__init__": "as for SFT",
    f"{REWARD}.evaluate": "prepares a data set that is passed",
    f"{REWARD}.training_step": "as for SFT",
    f"{REWARD}._save_checkpoint": "as for SFT",
    f"{REWARD}.log": "adds TRL's metrics to the logs that ours are in",
    f"{DISTILLATION}.__init__": "as for SFT",
    f"{DISTILLATION}._get_train_sampler": "as for GRPO, without groups",
    f"{DISTILLATION}._generate": "the one place where the student draws completions, tools included",
    f"{DISTILLATION}.training_step": "advances `_step` once a micro-step, after the backward",
    f"{DISTILLATION}._save_checkpoint": "as for SFT",
    f"{DISTILLATION}.log": "adds TRL's metrics to the logs that ours are in",
    f"{HF}.get_batch_samples": "hands over a whole accumulation window before its first micro-step",
    f"{HF}.create_optimizer": "returns the optimiser and keeps it in `optimizer`; called again by a second `train()`",
    f"{HF}._prepare_for_training": "wraps the model and creates the optimiser, before the loop; state is loaded in it",
    f"{HF}._get_grad_norm": "called after clipping and right before the optimiser's step, also without clipping",
    f"{HF}.evaluate": "recurses over dict data sets, under one swap of the deployed weights",
    f"{HF}.predict": "forwards without calling `evaluate`",
    f"{HF}.save_model": "`_internal_call=True` is a checkpoint, False a save; FSDP is saved whole if FULL_STATE_DICT",
    f"{HF}.push_to_hub": "saves again, as an internal call",
    f"{HF}._run_epoch": "one pass; a step is micro-steps, clipping, norm, optimiser, on_optimizer_step, counters",
    f"{HF}._finalize_training": "called once, after the last step and its log and save; trackers close in it",
    f"{HF}.train": "takes a checkpoint's path, True for the newest, or nothing",
    f"{HF}._save_rng_state": "the last file before trainer_state.json, on every rank",
    f"{HF}._load_best_model": "loads weights from `state.best_model_checkpoint`, after the last step",
    "trl.trainer.base_trainer:_BaseTrainer.create_model_card": "writes README.md into the output folder",
}

READ: dict[str, str] = {
    f"{HF}._maybe_log_save_evaluate": "a loss summed over an interval's steps; the log is before evaluation and save",
    f"{HF}._get_num_items_in_batch": "counts the window's shifted labels, over all ranks where they are averaged",
    f"{HF}.training_step": "divides the loss by the accumulation steps only where no token count was handed on",
    f"{HF}._save_checkpoint": "model, optimiser, random state, `state.save_to_json` by the saving rank, then rotation",
    f"{HF}._load_rng_state": "runs after the first window of a resumed epoch was drawn",
    f"{HF}._prepare_input": "moves nested tensors to the device",
    f"{HF}._prepare_inputs": "SFT: only moves tensors; a window's batches go through it once more",
    f"{GRPO}._prepare_inputs": "buffers a generation batch by `_step`; a buffer restored on resume is used as it is",
    f"{RLOO}._prepare_inputs": "as for GRPO",
    f"{DISTILLATION}._prepare_inputs": "as for GRPO; a buffer lasts for one accumulation window",
    f"{DPO}._compute_loss": "takes the reference's log-probabilities from `self.ref_model`, or from `self.model` with "
    "another adapter or none, never from what it is given as `model`",
    f"{KTO}._compute_loss": "as for DPO; of its forwards of `model` the last is the one that is trained on",
    "trl.trainer.dpo_trainer:DataCollatorForPreference.torch_call": "a row for each completion, with `completion_mask`",
    "trl.trainer.kto_trainer:DataCollatorForUnpairedPreference.torch_call": "as for DPO, and mismatched completions",
    "trl.trainer.sft_trainer:DataCollatorForLanguageModeling.torch_call": "position_ids restart at 0 with each sample",
    "trl.data_utils:_pack_bfd": "cuts and joins the lists of all columns alike, whatever they hold",
    "trl.data_utils:_pack_wrapped": "cuts and joins the lists of all columns alike, whatever they hold",
    "trl.trainer.utils:RepeatSampler": "shuffles once a pass, by one generator from its seed on, which no checkpoint "
    "keeps; drops the last part of a generation batch",
    "trl.trainer.utils:add_fused_lm_head": "replaces `forward` on the instance; outputs are chosen by name",
    "trl.trainer.utils:_ChunkedLogProbFunction": "`apply` gets hidden states, head and targets; a global name",
    "trl.kernels.chunked_logprob:_forward_tile": "folds a tile of logits, not scaled yet, into statistics",
    "trl.kernels.chunked_logprob:_forward_kernel": "the same in Triton, called as `kernel[grid](...)`",
    "trl.kernels.chunked_logprob:_torch_transform": "scales and caps logits",
    "transformers.integrations:TensorBoardCallback": "keeps its writer in `tb_writer` while the run lasts",
    "transformers.integrations:WandbCallback": "logs into `wandb.run`, over `train/global_step`",
    "trl.trainer.utils:get_callable_name": "names a reward function, partial or callable object in logs and rewards",
    "trl.trainer.utils:FusedCausalLMOutput": "log_probs, entropy, label_mask, is_top1 and the rest, shifted, (B, T)",
    "trl.scripts.sft:make_parser": "parses TRL's flags and YAML into script, training, model and data arguments",
    "trl.scripts.sft:main": "takes the four, and builds the trainer that it finds under TRL's names",
    "trl.scripts.grpo:make_parser": "as for SFT",
    "trl.scripts.grpo:main": "as for SFT",
    "trl.scripts.dpo:make_parser": "as for SFT",
    "trl.scripts.dpo:main": "as for SFT",
    "trl.scripts.kto:make_parser": "as for SFT",
    "trl.scripts.kto:main": "as for SFT",
    "trl.scripts.rloo:make_parser": "as for SFT",
    "trl.scripts.rloo:main": "as for SFT",
    "trl.scripts.reward:make_parser": "as for SFT",
    "trl.scripts.reward:main": "as for SFT",
    "trl.scripts.distillation:make_parser": "as for SFT",
    "trl.scripts.distillation:main": "as for SFT",
    "trl.scripts.utils:DatasetConfig": "describes a local file for the data mixture of a script",
    "transformers.masking_utils:find_packed_sequence_indices": "blocks of position_ids, without flash attention",
    "transformers.trainer_jit_checkpoint:CheckpointManager._sigterm_handler": "starts `_enable_checkpoint` some "
    "seconds after SIGTERM, on the instance",
    "transformers.trainer_jit_checkpoint:JITCheckpointCallback.set_trainer": "keeps the manager in `jit_manager`",
    "transformers.trainer_utils:PREFIX_CHECKPOINT_DIR": "names of checkpoint folders",
    f"{HF}._defer_fsdp_gradient_reduction": "with replicas of shards (HSDP), defers the sum between them alone, by "
    "`set_requires_all_reduce`, and takes it up again by `set_requires_gradient_sync`",
    f"{HF}._sync_replicated_trainable_parameters": "averages gradients of what FSDP2 does not manage by a hook on each "
    "parameter, where `sync_gradients` of accelerate's gradient state says so",
    "accelerate.utils.constants:FSDP_MODEL_NAME": "names of FSDP's files of weights in a checkpoint",
    "accelerate.state:GradientState": "one for the process; `sync_gradients` says whether a window ends",
    "accelerate.accelerator:Accelerator.get_state_dict": "gathers FSDP2's shards, whatever the state dict type is",
    "accelerate.utils.deepspeed:DeepSpeedEngineWrapper.backward": "calls `engine.backward`, then at a window's last "
    "micro-step `engine.step`, on the instance",
    "accelerate.commands.config.config_args:load_config_from_file": "reads a file as its launcher does",
    "accelerate.commands.launch:launch_command": "starts the processes",
    "trl.cli.accelerate_config:resolve_accelerate_config_argument": "finds a configuration of TRL's by its name",
    "trl.cli.accelerate_launcher:launch_training_script": "starts a script by accelerate, as `trl sft` does",
    "transformers.distributed:DistributedConfig": "the sizes of the dimensions that a model is split in",
    "trl.trainer.utils:is_async_callable": "tells an async reward function from a plain one",
    "accelerate.commands.launch:launch_command_parser": "knows the flags of accelerate's launcher",
    "accelerate:PartialState": "the number of processes, and the device that this one communicates from",
    "accelerate.utils:gather_object": "concatenates the lists of all ranks, in the order of the ranks",
    "accelerate.utils:is_peft_model": "whether PEFT wraps the model that carries the fused head",
}

_OF_ALL = {
    "_metrics": "metrics of the interval, by mode",
    "_total_train_tokens": "counter behind `num_tokens`, which TRL does not save",
}
_PREFERENCES = _OF_ALL | {
    "_tokenizer": "the tokenizer, also where a processor was given",
    "aux_loss_enabled": "whether the MoE balancing loss is part of the loss",
    "ref_model": "the reference, None where it is the model with another adapter or none, or precomputed",
}
_SAMPLING = _OF_ALL | {
    "_tokenizer": "the tokenizer, also where a processor was given",
    "_step": "micro-steps done; decides when to generate and which slice of the buffer is next",
    "_buffered_inputs": "rollouts still to be trained on",
}
_REWARDED = _SAMPLING | {
    "_logs": "rows of the table of completions; a generation batch's are the last after it is scored",
    "aux_loss_enabled": "whether the MoE balancing loss is part of the loss",
    "num_generations_eval": "completions a prompt in evaluation",
    "reward_func_names": "columns of the rewards",
    "reward_weights": "weights of the columns",
}
DEEPSPEED: dict[str, str] = {
    "DeepSpeedEngine.step": "clips, steps and lets go of the gradients, which are reduced by then",
    "DeepSpeedEngine.fp16_enabled": "whether a loss scaler leaves out steps with infinite gradients",
    "optimizer.averaged_gradients": "group to this rank's part of the reduced gradients, until the step",
    "optimizer.single_partition_of_fp32_groups": "ZeRO-1 and 2, offloaded: the part's gradient is their `.grad`",
    "optimizer.fp32_partitioned_groups_flat": "ZeRO-3, offloaded: as above",
    "parameter.ds_tensor": "ZeRO-3: this rank's part, flat and padded, in the model's dtype; what forwards gather from",
    "parameter.ds_numel": "ZeRO-3: elements of the whole parameter",
    "parameter.ds_status": "ZeRO-3: AVAILABLE while the whole parameter is there beside its part",
    "parameter.partition": "ZeRO-3: drops the whole parameters of a list, without writing them into the parts",
}
"""What is read of DeepSpeed 0.19, which is no dependency; `tests/test_deepspeed.py` fails where it moves."""

ATTRIBUTES: dict[str, dict[str, str]] = {
    "sft": _OF_ALL
    | {
        "_signature_columns": "the columns of prepared rows that the collator gets, None until they are asked for",
        "_tokenizer": "the tokenizer, also where a processor was given",
        "aux_loss_enabled": "whether the MoE balancing loss is part of the loss",
        "maybe_activation_offload_context": "what TRL runs its training step in",
        "padding_free": "whether batches are flattened, set by packing too",
    },
    "grpo": _REWARDED
    | {
        "_entropy_bonus_enabled": "switches the entropy bonus of `_compute_loss`",
        "beta": "switches the KL term of `_compute_loss`",
    },
    "dpo": _PREFERENCES,
    "kto": _PREFERENCES,
    "rloo": _REWARDED,
    "reward": _OF_ALL,
    "distillation": _SAMPLING,
}


def resolve(seam: str) -> Any:
    """The object that a seam names.

    Args:
        seam: `module:name` or `module:class.name`.

    Raises:
        AttributeError: it is not there any more.
    """
    module, _, path = seam.partition(":")
    found: Any = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def library(seam: str) -> str:
    """The library that a seam is in."""
    return seam.partition(":")[0].partition(".")[0]


def fingerprint(seam: str) -> str:
    """16 hexadecimal digits of the sha256 of a seam's signature and source, or of its value where it is a constant.

    Raises:
        AttributeError: it is not there any more.
    """
    found = resolve(seam)
    if callable(found):
        found = getattr(found, "fn", found)  # where Triton is there, it compiles TRL's kernels
        found = inspect.unwrap(found)  # TRL times some methods with a decorator
        text = f"{_signature(found)}\n{dedent(inspect.getsource(found))}"
    else:
        text = repr(found)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _signature(found: Any) -> str:
    return ", ".join(f"{p.kind.name} {p.name}" for p in inspect.signature(found).parameters.values())


def recorded() -> dict[str, dict[str, dict[str, str]]]:
    """Library to reviewed release to the fingerprint of each seam in it."""
    record: dict[str, dict[str, dict[str, str]]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record
