"""Whether a defense can be bound to a model, told from the model's config before any weights are loaded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig

from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses import DEFENSES, build_defense

LOG = logging.getLogger(__name__)


def binding_problems(config: DefenseConfig, model_config: Any, *, trust_remote_code: bool) -> list[str]:
    """Says why the defense cannot be bound to the model, in the words that training would use; empty when it can.

    Nothing is said of a model that cannot be built like this, and of a defense from outside, whose code may want
    weights: training tells.

    Args:
        config: The defense's settings.
        model_config: The model's, as Axolotl loads it.
        trust_remote_code: The recipe's key of this name; code that comes with the model runs only with it.
    """
    if type(config) not in DEFENSES or not isinstance(model_config, PretrainedConfig):
        return []
    try:
        model = _without_weights(model_config, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any model's code
        LOG.debug("no model without weights: %s", error)
        return []
    name = type(model).__name__
    try:
        build_defense(config, _with_adapter(model) if config.needs_adapter else model, seed=0)
    except ValueError as error:
        return [f"base_model: {error}" if str(error).startswith(name) else str(error)]
    except (RuntimeError, NotImplementedError) as error:  # it wants weights
        LOG.debug("not bound without weights: %s", error)
    return []


def _without_weights(config: PretrainedConfig, *, trust_remote_code: bool) -> nn.Module:
    is_decoder = not config.is_encoder_decoder or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if is_decoder else AutoModelForSeq2SeqLM
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, trust_remote_code=trust_remote_code)
    return model


def _with_adapter(model: Any) -> nn.Module:
    """Under an adapter in every layer; which layers the recipe's own is in, training tells."""
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear"))
    return adapted
