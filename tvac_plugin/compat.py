"""What a defense cannot be combined with: one table, read by the schema, by `axolotl tvac check` and by the docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Area = Literal["launch", "precision", "weights", "training"]
Status = Literal["supported", "refused", "untested"]


class Refusal(NamedTuple):
    """One setting of the host that no defense can honour.

    Attributes:
        key: The recipe's key.
        refused: Whether a value of that key, never `None`, is refused.
        reason: Why, and what to write instead.
    """

    key: str
    refused: Callable[[Any], bool]
    reason: str


def _is_on(value: Any) -> bool:
    return bool(value)


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _is_reentrant(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value.get("use_reentrant"))


def _is_offload(value: Any) -> bool:
    return value in ("offload", "offload_disk")


_SHARDED = (
    "shards weights under FSDP, which has been tried in parts only: see the support matrix. Remove it and train on one "
    "GPU or with DDP."
)
_ENGINE = (
    "steps the optimizer inside its own backward pass and keeps gradients out of reach, so a second pass would be "
    "trained on. Remove it and train on one GPU or with DDP."
)
_SPLIT = "splits one sequence over processes, and the perturbation's norm with it. Set it to 1."

REFUSALS: tuple[Refusal, ...] = (
    Refusal("rl", _is_on, "trains with preferences; the defense is supervised fine-tuning. Remove `rl:`."),
    Refusal("reward_model", _is_on, "trains a reward model, which gives no answers to defend. Remove it."),
    Refusal("process_reward_model", _is_on, "trains a reward model, which gives no answers to defend. Remove it."),
    Refusal("trainer_cls", _is_on, "names another trainer, and there can be only one. Remove it."),
    Refusal("deepspeed", _is_on, _ENGINE),
    Refusal("fsdp", _is_on, _SHARDED),
    Refusal("fsdp_config", _is_on, _SHARDED),
    Refusal("torch_compile", _is_on, "ignores hooks that come and go, so the defense would do nothing. Remove it."),
    Refusal("context_parallel_size", _above_one, _SPLIT),
    Refusal("sequence_parallel_degree", _above_one, _SPLIT),
    Refusal("tensor_parallel_size", _above_one, _SPLIT),
    Refusal("expert_parallel_size", _above_one, _SPLIT),
    Refusal("relora", _is_on, "resets and merges adapters that the defense has frozen. Remove it."),
    Refusal(
        "lisa_n_layers",
        _is_on,
        "freezes layers by its own draw. Remove the `lisa_` keys; t_vaccine draws layers.",
    ),
    Refusal("streaming", _is_on, "gives no data set to hash and no length. Set `streaming: false`."),
    Refusal("pretraining_dataset", _is_on, "gives no prompts and answers. Use `datasets:`."),
    Refusal("processor_type", _is_on, "is for multimodal models, which are not supported. Use a text-only model."),
    Refusal(
        "gradient_checkpointing_kwargs",
        _is_reentrant,
        "must have `use_reentrant: false`: the reentrant kind hides the gradients that the first pass reads.",
    ),
    Refusal("gradient_checkpointing", _is_offload, "moves activations that the first pass reads. Use `true`."),
    Refusal("activation_offloading", _is_on, "moves activations that the first pass reads. Remove it."),
    Refusal("layer_offloading", _is_on, "moves layers between the two passes. Remove it."),
    Refusal("tiled_mlp", _is_on, "writes parameter gradients during the first pass. Remove it."),
    Refusal("fp8", _is_on, "rounds the perturbation away. Use `bf16: true`."),
    Refusal("qat", _is_on, "quantizes inside the perturbed forward pass. Remove it and quantize after training."),
    Refusal("use_ray", _is_on, "starts processes that do not load this plugin. Use `axolotl train` alone."),
)


class Support(NamedTuple):
    """A way to train, and what is known about it.

    Attributes:
        area: What it is a way of.
        feature: What it is called.
        status: Whether it works, is refused when the trainer is built, or has not been tried.
        note: Limits, or why not.
        shown_by: The test that shows it, as `file::function`; empty where there is none.
    """

    area: Area
    feature: str
    status: Status
    note: str
    shown_by: str = ""


_SFT = "tests/test_trainer_sft.py::"
_PLUGIN = "tests/test_plugin.py::"
_PROCESSES = "tests/processes/test_processes.py::"

SUPPORT: tuple[Support, ...] = (
    Support(
        "launch",
        "one process",
        "supported",
        "Run on CPUs only so far.",
        f"{_PLUGIN}test_a_defended_run_leaves_adapter_manifest_and_trace",
    ),
    Support(
        "launch",
        "DDP, TRL's trainer",
        "supported",
        "All defenses, gradient accumulation and resuming; tried with two processes over gloo on CPUs, not with NCCL.",
        f"{_PROCESSES}test_every_defense_trains_as_one_process_that_accumulates",
    ),
    Support(
        "launch",
        "DDP, Axolotl's trainer",
        "supported",
        "As above. `axolotl train` itself starts several processes only on GPUs, which has not been tried.",
        f"{_PROCESSES}test_axolotl_s_trainer_trains_in_two_processes_as_in_one_that_accumulates",
    ),
    Support(
        "launch",
        "DDP, a simulated user under lisa",
        "supported",
        "Axolotl's trainer, two processes over gloo on CPUs; the first process alone writes both proofs.",
        f"{_PROCESSES}test_lisa_defends_a_simulated_user_s_fine_tuning_in_two_processes",
    ),
    Support(
        "launch",
        "DDP on several machines",
        "untested",
        "Nothing in it knows of machines; resuming needs an `output_dir` that they share.",
    ),
    Support(
        "launch",
        "DataParallel",
        "refused",
        "Copies of a module are not the module that was hooked.",
        f"{_PROCESSES}test_several_gpus_in_one_process_are_refused",
    ),
    Support(
        "launch",
        "DeepSpeed ZeRO 1 to 3",
        "refused",
        "accelerate runs the engine's optimizer step inside its backward pass.",
        f"{_PROCESSES}test_launches_that_cannot_be_defended_are_refused",
    ),
    Support(
        "launch",
        "FSDP1",
        "refused",
        "Flattened weights cannot rest layer by layer.",
        f"{_PROCESSES}test_launches_that_cannot_be_defended_are_refused",
    ),
    Support(
        "launch",
        "FSDP2",
        "refused",
        "t_vaccine, vaccine and random_noise trained as under DDP in a trial over gloo on CPUs, but a run cannot be "
        "resumed while a layer was never drawn (its optimizer has no state to save), and the other defenses read "
        "weight gradients that FSDP2 does not give.",
        f"{_PROCESSES}test_launches_that_cannot_be_defended_are_refused",
    ),
    Support("precision", "float32", "supported", "", f"{_PLUGIN}test_a_defended_run_leaves_adapter_manifest_and_trace"),
    Support("precision", "bfloat16 weights", "supported", "", f"{_PLUGIN}test_features_of_the_host_work"),
    Support(
        "precision",
        "fp16",
        "untested",
        "The loss scale is accounted for; no training run has shown it.",
        "tests/test_trainer_host.py::test_added_gradients_are_on_the_scale_that_the_optimizer_takes_off",
    ),
    Support("weights", "LoRA", "supported", "", f"{_SFT}test_one_optimizer_step_is_the_paper_s_gradient"),
    Support(
        "weights",
        "QLoRA (bitsandbytes nf4)",
        "supported",
        "",
        "tests/test_qlora.py::test_drawn_adapters_learn_and_nothing_else_moves",
    ),
    Support("weights", "full fine-tuning", "supported", "", f"{_PLUGIN}test_features_of_the_host_work"),
    Support(
        "training",
        "gradient accumulation",
        "supported",
        "",
        f"{_SFT}test_metrics_scale_with_the_loss_under_accumulation",
    ),
    Support(
        "training",
        "gradient checkpointing",
        "supported",
        "The non-reentrant kind.",
        f"{_SFT}test_checkpointing_changes_no_weight",
    ),
    Support("training", "sample packing", "supported", "", f"{_PLUGIN}test_features_of_the_host_work"),
    Support(
        "training",
        "evaluation during training",
        "supported",
        "",
        f"{_SFT}test_evaluation_during_training_is_undisturbed",
    ),
    Support(
        "training",
        "resuming",
        "supported",
        "Bit for bit on CPUs, also after `kill -9`, with the same settings, data and number of processes.",
        "tests/test_resume.py::test_it_may_be_killed_at_any_moment",
    ),
    Support(
        "training",
        "resuming in several processes",
        "supported",
        "As above, with each process's own dropout, between two logs and within an epoch.",
        f"{_PROCESSES}test_two_processes_resume_exactly_between_two_logs_and_within_an_epoch",
    ),
    Support(
        "training",
        "resuming with another number of processes",
        "refused",
        "Each process reads rows and draws random numbers by its place among all of them.",
        f"{_PROCESSES}test_one_process_does_not_go_on_where_two_stopped",
    ),
    Support("training", "fused LoRA kernels", "untested", "They need CUDA."),
    Support("training", "flash and flex attention", "untested", "They need CUDA."),
)
"""What is known, beside `REFUSALS`."""


def conflicts(recipe: Mapping[str, Any]) -> list[str]:
    """Lists the settings of `recipe` that no defense can honour, one sentence each with the way out."""
    return [
        f"`{refusal.key}` {refusal.reason}"
        for refusal in REFUSALS
        if recipe.get(refusal.key) is not None and refusal.refused(recipe[refusal.key])
    ]
