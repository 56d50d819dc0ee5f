"""What a model's head makes of hidden states from any depth: the logit lens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.model.architecture import final_norm
from tvac_plugin.model.types import Outputs

_TOLERANCE = 0.05


class Readout:
    """The norm and the head of a model, with what its architecture does to the logits."""

    def __init__(self, model: nn.Module, *, reader: str) -> None:
        """Finds both.

        Args:
            model: The model without the trainer's wrappers.
            reader: Who reads, as an error names it.

        Raises:
            UserError: There is no norm before the head.
        """
        self._norm, self._head = final_norm(model), model.get_output_embeddings()  # type: ignore[operator]
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        self._cap = getattr(text, "final_logit_softcapping", None)
        self._name = type(text).__name__.removesuffix("Config")
        self._reader = reader
        self._is_checked = False

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits, [..., vocabulary], of states before the norm, [..., hidden]."""
        return self._logits(self._norm(hidden))

    def check(self, outputs: Outputs) -> None:
        """Holds the head against the model's own logits, once.

        Raises:
            UserError: The model does something to its logits that is not known here.
        """
        if self._is_checked:
            return
        with torch.no_grad():
            logits = outputs.logits[:, -1].float()
            normed = outputs.hidden_states[-1][:, -1].detach()
            difference = self._logits(normed).float().to(logits.device) - logits
        agrees = ~(difference.abs().max() > _TOLERANCE * logits.abs().max())
        if not agrees:  # to fake tensors, with which a plan is made, everything is true
            raise UserError(
                f"{self._reader} cannot read the layers of {self._name}: its logits are not its head's. "
                "Use another defense."
            )
        self._is_checked = True

    def _logits(self, normed: Tensor) -> Tensor:
        logits: Tensor = self._head(normed.to(self._head.weight.dtype)) * self._scale
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)


def adds_residual(mlp: nn.Module) -> bool:
    """Whether a feed-forward module is given the residual and adds it itself (BLOOM, MPT)."""
    return "residual" in inspect.signature(mlp.forward).parameters
