"""What a defense cannot be combined with: one table, read by the schema, by `axolotl tvac check` and by the docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


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


def _is_nothing(value: Any) -> bool:
    return isinstance(value, int | float) and not value > 0


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _clips_all(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1e-6


def _is_all(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 1


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _is_reentrant(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value.get("use_reentrant"))


def _is_offload(value: Any) -> bool:
    return value in ("offload", "offload_disk")


def _splits(value: Any) -> bool:
    return _above_one(value.get("size") if isinstance(value, Mapping) else getattr(value, "size", None))


def _is_mixlora(value: Any) -> bool:
    return bool(value == "mixlora")


def _is_torchao(value: Any) -> bool:
    return bool(value == "torchao")


_SHARDED = (
    "shards weights under FSDP, which has been tried only in part: see the support matrix. Remove it and train on one "
    "GPU or with DDP."
)
_ENGINE = (
    "steps the optimizer inside its own backward pass and keeps gradients out of reach, so a second pass would train "
    "the weights too. Remove it and train on one GPU or with DDP."
)
_SPLIT = "splits one sequence over processes, and the perturbation's norm with it. Set it to 1."
_DIFFUSION = "trains a model that fills in masked tokens, which has no answer head to defend. Remove it."

REFUSALS: tuple[Refusal, ...] = (
    Refusal("rl", _is_on, "trains with preferences; the defenses need supervised fine-tuning. Remove `rl:`."),
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
    Refusal("context_parallel", _splits, "splits one sequence over processes. Set its `size` to 1."),
    Refusal(
        "adapter", _is_mixlora, "must not be mixlora, whose routers and experts only its own trainer saves. Use `lora`."
    ),
    Refusal(
        "nf4_backend", _is_torchao, "must not be torchao, whose packed weights cannot be told. Use `bitsandbytes`."
    ),
    Refusal(
        "nvfp4_merge_aware",
        _is_on,
        "trains against rounded weights, which round the perturbation too. Set it to false.",
    ),
    Refusal("balance_labels", _is_on, "orders and resumes the rows in a way of its own. Remove it."),
    Refusal(
        "fa_varlen_kwargs_in_collator",
        _is_on,
        "describes a batch as a whole, and defenses cut batches. Set it to false.",
    ),
    Refusal("diffusion_lm", _is_on, _DIFFUSION),
    Refusal("relora", _is_on, "resets and merges adapters that the defense has frozen. Remove it."),
    Refusal(
        "lisa_n_layers",
        _is_on,
        "draws layers and freezes the others itself. Remove the `lisa_` keys; t_vaccine draws layers.",
    ),
    Refusal("learning_rate", _is_nothing, "trains nothing, so nothing would be defended. Set it above 0."),
    Refusal(
        "max_grad_norm",
        _clips_all,
        "clips gradients to next to nothing, and weight decay alone trains. Set it above 1e-6.",
    ),
    Refusal("adam_epsilon", _is_all, "divides all updates, and weight decay alone trains. Set it below 1."),
    Refusal("lora_alpha", _is_zero, "multiplies the adapter by nothing, so nothing would be defended. Set it above 0."),
    Refusal("lora_dropout", _is_all, "drops all that the adapter could learn from. Set it below 1."),
    Refusal("streaming", _is_on, "provides no data set to hash, and no length. Set `streaming: false`."),
    Refusal("pretraining_dataset", _is_on, "has no prompts and answers. Use `datasets:`."),
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


def conflicts(recipe: Mapping[str, Any]) -> list[str]:
    """Lists the settings of `recipe` that no defense can honour, one sentence each with the way out."""
    return [
        f"`{refusal.key}` {refusal.reason}"
        for refusal in REFUSALS
        if recipe.get(refusal.key) is not None and refusal.refused(recipe[refusal.key])
    ]
