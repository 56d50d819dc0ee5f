"""RepNoise (Rosati et al., arXiv 2405.14577): representations of harmful answers are turned into noise.

Each pair is one prompt with a harmful answer x_h and a refusal x_s. m marks the answer tokens at which the two differ,
which leaves out what they share.

    L = L(w; B) + CE_m(x_s) + beta * N - alpha * log(1 + A)                                   (equation 4)

    N = mean over layers of MMD(m * mlp_l(x_h), m * z_l),  z_l from N(0, I)
    A = mean over the L + 1 depths of CE_m(lm_head(norm(h_l)); x_h), the last of which is the model's own output

B is the alignment batch: the paper's stability term is taken on all of `datasets:` and on the pairs' refusals.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.unlearning import RepNoiseConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepReport, trainable
from tvac_plugin.model.architecture import find_blocks
from tvac_plugin.model.hooks import capture
from tvac_plugin.model.logit_lens import Readout, adds_residual
from tvac_plugin.model.numerics import norm, precise, seed_of
from tvac_plugin.model.types import Batch, Outputs, Pair
from tvac_plugin.model.weights import finite

_NUM_KERNELS = 5


class RepNoise(Defense):
    """Representation noising; forward and backward on two more batches per optimizer step."""

    config_class = RepNoiseConfig

    def __init__(self, config: RepNoiseConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to `model`; the noise depends on `seed`, the layer and the batch of pairs.

        Raises:
            UserError: The model has no feed-forward modules of their own, or no norm before its head.
        """
        for block in find_blocks(model):
            if block.mlp is None or adds_residual(block.mlp):
                raise UserError(
                    f"rep_noise needs feed-forward modules, and {type(block.layer).__name__} has none whose output is "
                    "not yet added to the residual. Use another defense."
                )
        self._config = config
        self._seed = seed
        self._weights = trainable(model)
        self._mlps = {block.index: block.module("mlp") for block in find_blocks(model)}
        self._readout = Readout(model, reader=config.block)

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Adds the gradient on one batch of pairs at the start of an optimizer step, then trains as usual."""
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        if position.starts_step:
            with host.auxiliary():
                pair = host.pair("pairs", position.step)
                loss, losses = self._loss(host, pair, host.number(position.step))
                gradients = finite(host.gradients(loss, self._weights))
            host.add_gradients(self._weights, gradients)
            norms = {"regularizer_norm": norm(gradients)}
        return StepReport(loss=host.train(batch), losses=losses, norms=norms)

    def _loss(self, host: Host, pair: Pair, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """CE_m(x_s) + beta * N - alpha * log(1 + A), and its parts."""
        harmful, refusal = pair
        differ = harmful["input_ids"] != refusal["input_ids"]
        answered = masked_cross_entropy(host.outputs(refusal).logits, refusal, differ)
        with capture(self._mlps) as mlp_outputs:
            outputs = host.outputs(harmful, hidden_states=True)
        self._readout.check(outputs)
        mask = differ.to(outputs.logits.device) & (harmful["labels"].to(outputs.logits.device) != -100)
        noise = self._noise_loss(mlp_outputs, mask, number)
        ascent = cross_entropy_at_all_depths(self._readout, outputs, harmful, differ)
        config = self._config
        total = config.refusal_scale * answered + config.beta * noise - config.alpha * torch.log1p(ascent)
        parts = {"refusal_loss": answered, "noise_loss": noise, "harmful_loss": ascent}
        return total, {name: part.detach() for name, part in parts.items()}

    def _noise_loss(self, mlp_outputs: dict[int, Tensor], mask: Tensor, number: int) -> Tensor:
        """N, from the feed-forward outputs, each [batch, sequence, hidden], and the mask, [batch, sequence]."""
        distances = []
        for layer, hidden in sorted(mlp_outputs.items()):
            x = precise(hidden)
            generator = torch.Generator(x.device).manual_seed(seed_of(self._seed, number, layer))
            z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            kept = mask.to(x.device).unsqueeze(-1)
            distances.append(mmd((x * kept).flatten(1), (z * kept).flatten(1)).to(mask.device))
        return torch.stack(distances).mean()


def cross_entropy_at_all_depths(readout: Readout, outputs: Outputs, batch: Batch, mask: Tensor) -> Tensor:
    """A: mean over the model's output and what its head reads from each depth below; only masked positions are read.

    Args:
        readout: Of the model.
        outputs: For `batch`, with hidden states.
        batch: Token ids and labels.
        mask: Which answer tokens count, [batch, sequence].
    """
    losses = [masked_cross_entropy(outputs.logits, batch, mask)]
    for hidden in outputs.hidden_states[:-1]:
        chosen, targets = _masked(hidden, batch, mask)
        losses.append(_mean_cross_entropy(readout(chosen), targets))
    return torch.stack(losses).mean()


def masked_cross_entropy(logits: Tensor, batch: Batch, mask: Tensor) -> Tensor:
    """Mean cross-entropy of the answer tokens at which `mask`, [batch, sequence], holds; token ids stay integers."""
    return _mean_cross_entropy(*_masked(logits, batch, mask))


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the rows of `x` and `y`, both [samples, features].

    The kernel is a sum of five Gaussians whose bandwidths are 1/4, 1/2, 1, 2 and 4 times the mean squared distance
    between two different rows.
    """
    rows = torch.cat([x, y])
    squares = rows.square().sum(1)
    distances = (squares[:, None] + squares[None, :] - 2 * rows @ rows.T).clamp(min=0)
    mean = distances.detach().sum() / (len(rows) ** 2 - len(rows))
    widths = [mean.clamp(min=1e-12) * 2.0 ** (i - _NUM_KERNELS // 2) for i in range(_NUM_KERNELS)]
    kernel = torch.stack([torch.exp(-distances / width) for width in widths]).sum(0)
    n = len(x)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def _masked(states: Tensor, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The states that predict the masked answer tokens, [tokens, ...], and these tokens."""
    labels = batch["labels"].to(states.device)
    kept = mask.to(states.device) & (labels != -100)
    return states[:, :-1][kept[:, 1:]], labels[:, 1:][kept[:, 1:]]


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.numel() == 0:
        return logits.sum() * 0
    return F.cross_entropy(precise(logits), targets)
