"""CTRAP (Yi et al., arXiv 2505.16559): a model that is trained on harm forgets how to answer anything.

    min over w of  L(w; D_a) + lambda * E(w - alpha * grad h(w); D_g)

    E(w; D) = mean over (x, y) in D of  -1/|y| * sum over t of log p(e | x, y_<t; w)

D_a is alignment data, h the loss on harmful data, D_g general data, and e one fixed token: who says it everywhere says
nothing. The harmful step is not normalised. First order: the gradient at w' is applied at w.

    every optimizer step    w'  = w - alpha * grad h(w)           on one harmful batch
                            g_E = grad E(w')                      on one general batch
                            update w with  grad L(w) + lambda * g_E
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.collapse import CTRAPConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepReport, trainable
from tvac_plugin.model.numerics import norm, precise
from tvac_plugin.model.types import Batch
from tvac_plugin.model.weights import NOTHING, combined, finite, restored


class CTRAP(Defense):
    """Plants a collapse that a harmful step sets off; three gradients per optimizer step."""

    config_class = CTRAPConfig

    def __init__(self, config: CTRAPConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to the trainable weights of `model`; `seed` is unused, the batches are seeded.

        Raises:
            UserError: The model has no such token, or none that ends a text.
        """
        self._config = config
        self._weights = trainable(model)
        self._token = _fixed_token(config, model)

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Adds the trap's gradient at the start of an optimizer step, then trains as usual."""
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        events: list[dict[str, Any]] = []
        if position.starts_step:
            trap, losses = self._trap(host, position.step)
            host.add_gradients(self._weights, trap)
            norms = {"regularizer_norm": norm(trap)}
            events = [{"event": "collapse_token", "token": self._token}] if position.step == 0 else []
        return StepReport(loss=host.train(batch), losses=losses, norms=norms, events=events)

    def _trap(self, host: Host, step: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Lambda * g_E, and h(w) and E(w'); the weights are as before."""
        if isinstance(self._token, str):
            raise UserError(
                f"ctrap.collapse_token: {self._token!r} is text, and no tokenizer has read it. Give a token's id, or "
                "use `config.with_tokenizer(tokenizer)`."
            )
        with host.auxiliary():
            harmful = host.mean_loss(host.batch("harmful", step))
            g_h = host.gradients(harmful, self._weights)
        with restored(self._weights), host.auxiliary():
            has_moved = self._take_harmful_step(g_h)
            general = host.batch("general", step)
            collapse = collapse_loss(host.outputs(general).logits, general, self._token)
            g_e = finite(host.gradients(collapse, self._weights))
        # where rounding takes the step away, the gradient at w' = w would make the model collapse without one
        trap = [torch.where(has_moved.to(g.device), g, 0.0) for g in combined((self._config.collapse_scale, g_e))]
        return trap, {"harmful_loss": harmful.detach(), "collapse_loss": collapse.detach()}

    @torch.no_grad()
    def _take_harmful_step(self, g_h: list[Tensor]) -> Tensor:
        """Moves the weights to w'; returns whether that is anywhere else."""
        flags = []
        for weight, g in zip(self._weights, g_h, strict=True):
            moved = weight - self._config.harmful_step_size * g
            flags.append(((moved - weight).abs().max() > NOTHING).to(self._weights[0].device))
            weight.copy_(moved)
        return torch.stack(flags).any()


def collapse_loss(logits: Tensor, batch: Batch, token: int) -> Tensor:
    """E: mean over rows of the mean over answer positions of -log p(e) there, a scalar.

    With packing, a row is one packed row.

    Args:
        logits: [batch, sequence, vocabulary].
        batch: Its labels say where the answers are.
        token: e.
    """
    answered = batch["labels"].to(logits.device)[:, 1:] != -100
    scores = precise(logits[:, :-1])
    surprise = scores.logsumexp(-1) - scores[..., token]
    lengths = answered.sum(-1)
    means = torch.where(answered, surprise, 0.0).sum(-1) / lengths.clamp(min=1)
    mean: Tensor = means.sum() / (lengths > 0).sum().clamp(min=1)
    return mean


def _fixed_token(config: CTRAPConfig, model: Any) -> int | str:
    """The id of e, by default the first of those that end a text; its text if no tokenizer has read the settings."""
    key, token = f"{config.block}.collapse_token", config.collapse_token
    if token is None:
        ends = getattr(model.config.get_text_config(), "eos_token_id", None)
        token = ends[0] if isinstance(ends, list) else ends
    if token is None:
        raise UserError(f"{key}: the model's config names no token that ends a text (`eos_token_id`). Name a token.")
    size = len(model.get_output_embeddings().weight)
    if isinstance(token, int) and token >= size:
        raise UserError(f"{key}: {token} is not among the {size:,} tokens of the model. Give an id below {size}.")
    return token
