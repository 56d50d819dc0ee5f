"""Adapters: those that change nothing or that anyone can leave out, and a model without its own for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tvac_plugin.boundary.errors import UserError


def refuse_silent_adapters(model: nn.Module) -> None:
    """Refuses a LoRA that is multiplied by 0, or whose dropout takes all of its input away.

    Its weights may still move, by weight decay.

    Raises:
        UserError: There is one; names its setting.
    """
    for module in model.modules():
        scaling, dropout = getattr(module, "scaling", None), getattr(module, "lora_dropout", None)
        if not isinstance(scaling, dict) or not isinstance(dropout, nn.ModuleDict):
            continue
        if any(scale == 0 for scale in scaling.values()):
            raise UserError(
                "lora_alpha: 0 multiplies the adapter by nothing, so nothing would be defended. Set it above 0."
            )
        if any(getattr(layer, "p", 0) >= 1 for layer in dropout.values()):
            raise UserError("lora_dropout: 1 drops all that the adapter could learn from. Set it below 1.")


def refuse_prompt_learning(model: Any) -> None:
    """Refuses prompt tuning, prefix tuning and p-tuning: no layer learns, so there is nothing to defend in any.

    Raises:
        UserError: The active adapter is virtual tokens; names its kind.
    """
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise UserError(
                f"{config.peft_type.value} learns virtual tokens and leaves every layer as it was: who leaves them out "
                "has the undefended model. Use LoRA, or train the weights themselves."
            )


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Inside it a PEFT model computes what it would without its adapter; no `requires_grad` is another one afterwards.

    PEFT alone would leave every adapter weight learning, those too that were frozen.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def learning_outside_adapter(model: nn.Module) -> list[str]:
    """Names of the parameters that learn and that leaving the adapter out would not undo."""
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with adapter_off(model):
        return [name for name, parameter in learning if parameter.requires_grad]
