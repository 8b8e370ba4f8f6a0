"""The seams of TRL and PEFT that this distribution stands on; `tests/test_seams.py` fingerprints them."""

READ: dict[str, str] = {
    "trl.trainer.grpo_trainer:GRPOTrainer.__init__": (
        'keeps the reference in `ref_model`, or as an adapter "ref" beside "default"; a fresh adapter has neither'
    ),
    "peft.utils.save_and_load:get_peft_model_state_dict": "takes the adapter's name, `default`, out of stored names",
    "peft.utils.other:get_pattern_key": "matches a pattern of `alpha_pattern` with the end of a module's name",
    "peft.tuners.lora.layer:LoraLayer.update_layer": "scales B A by alpha / r, with use_rslora by alpha / sqrt(r)",
}
