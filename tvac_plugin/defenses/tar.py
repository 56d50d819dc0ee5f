"""TAR, tamper-resistant safeguards (Tamirisa et al., arXiv 2408.00761, Algorithm 1).

    every optimizer step    x_tr: held-out harmful rows;  eta: drawn adversary learning rate;  g_tr = 0
        k = 0 .. K - 1      one step of a fresh AdamW(eta) on an adversary's batch; in a third of the optimizer steps
                            on benign batches first, and on harmful ones after a Beta-distributed share of K
                            every few k:  g_tr += exp(decay * (k - (K - 1))) * grad L_TR(w_k; x_tr)
        w restored          update with  grad L(w; B) + lambda_retain * grad L_retain(w; x_r) + lambda_TR * g_tr

g_tr is first order: gradients at the attacked weights w_k are applied to w. L_TR is DPO's loss with the refusal
preferred, or the negative entropy. L_retain adds to the language modelling loss on x_r the mean over depths and tokens
of ||h_w(x_r) - h_0(x_r)||, with h_0 the hidden states before training.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvac_plugin.configs.unlearning import TARConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepReport, trainable
from tvac_plugin.model.numerics import norm, precise, seed_of
from tvac_plugin.model.types import Batch
from tvac_plugin.model.weights import combined, copied, finite, replaced, restored


class TAR(Defense):
    """Trains weights whose refusal survives an adversary's fine-tuning, simulated at every step."""

    config_class = TARConfig

    def __init__(self, config: TARConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to `model`, whose weights at this moment are the reference of both losses."""
        self._config = config
        self._seed = seed
        self._weights = trainable(model)
        self._first_weights = copied(self._weights)

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Adds the tamper-resistance and retain gradients at the start of an optimizer step, then trains as usual."""
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        effect = None
        if position.starts_step:
            tamper, losses = self._tamper_resistance(host, position.step)
            retain, retained = self._retain(host, batch, position.step)
            total = combined((self._config.tamper_scale, tamper), (self._config.retain_scale, retain))
            host.add_gradients(self._weights, total)
            losses |= {"retain_loss": retained}
            norms = {"tamper_norm": norm(tamper), "retain_norm": norm(retain)}
            effect = self._config.tamper_scale * norms["tamper_norm"]
        return StepReport(loss=host.train(batch), losses=losses, norms=norms, effect=effect)

    def _tamper_resistance(self, host: Host, step: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """g_tr, and the tamper loss at the last evaluation; the weights are as before."""
        config = self._config
        rng = random.Random(seed_of(self._seed, step))
        learning_rate = rng.choice(config.adversary_learning_rates)
        switches = host.has("benign") and rng.random() < config.switch_share
        share = rng.betavariate(*config.switch_beta) if switches else 0.0
        num_benign_steps = math.floor(config.inner_steps * share)
        gradient = [torch.zeros_like(weight) for weight in self._weights]
        with host.auxiliary():
            reference = self._reference(host, step)
            with restored(self._weights):
                adversary = torch.optim.AdamW(self._weights, lr=learning_rate)
                for k in range(config.inner_steps):
                    stream = "benign" if k < num_benign_steps else "adversary"
                    adversary_loss = self._attack(host, adversary, host.batch(stream, step * config.inner_steps + k))
                    if (k + 1) % config.tamper_every == 0:
                        loss = self._tamper_loss(host, step, reference)
                        weight = math.exp(config.schedule_decay * (k - (config.inner_steps - 1)))
                        gradient = combined((1.0, gradient), (weight, host.gradients(loss, self._weights)))
        return finite(gradient), {"tamper_loss": loss.detach(), "adversary_loss": adversary_loss}

    def _attack(self, host: Host, adversary: torch.optim.AdamW, batch: Batch) -> Tensor:
        """One step of the adversary."""
        loss = host.mean_loss(batch)
        for weight, gradient in zip(self._weights, host.gradients(loss, self._weights), strict=True):
            weight.grad = gradient
        adversary.step()
        adversary.zero_grad()
        return loss.detach()

    def _tamper_loss(self, host: Host, step: int, reference: Tensor | None) -> Tensor:
        """L_TR at the current, attacked weights."""
        if reference is None:
            batch = host.batch("tamper", step)
            return -answer_entropy(host.outputs(batch).logits, batch)
        return -F.logsigmoid(self._config.dpo_beta * (self._preference(host, step) - reference)).mean()

    def _preference(self, host: Host, step: int) -> Tensor:
        """Log p(refusal) - log p(harmful answer) for each held-out prompt."""
        harmful, refusal = host.pair("tamper", step)
        return answer_log_probability(host.outputs(refusal).logits, refusal) - answer_log_probability(
            host.outputs(harmful).logits, harmful
        )

    def _reference(self, host: Host, step: int) -> Tensor | None:
        """`_preference` of the weights before training, which DPO compares with; `None` for the entropy."""
        if self._config.tamper_loss == "entropy":
            return None
        with replaced(self._weights, self._first_weights), torch.no_grad():
            return self._preference(host, step)

    def _retain(self, host: Host, batch: Batch, step: int) -> tuple[list[Tensor], Tensor]:
        """Gradient of L_retain; on alignment data, where training has the first term anyway, of the second alone."""
        has_own_data = host.has("retain")
        rows = host.batch("retain", step) if has_own_data else batch
        with host.auxiliary(), replaced(self._weights, self._first_weights), torch.no_grad():
            before = host.outputs(rows, hidden_states=True).hidden_states
        with host.auxiliary():
            now = host.outputs(rows, hidden_states=True).hidden_states
            loss = self._config.representation_scale * mean_distance(now, before, rows)
            if has_own_data:
                loss = loss + host.mean_loss(rows)
            return finite(host.gradients(loss, self._weights)), loss.detach()


def answer_log_probability(logits: Tensor, batch: Batch) -> Tensor:
    """Log probability of each row's labelled tokens together, [batch], from logits, [batch, sequence, vocabulary]."""
    labels = batch["labels"].to(logits.device)[:, 1:]
    kept = labels != -100
    scores = precise(logits[:, :-1]).log_softmax(-1)
    chosen = scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    total: Tensor = (chosen * kept).sum(-1)
    return total


def answer_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean entropy, in nats, of the predictions of labelled tokens."""
    kept = batch["labels"].to(logits.device)[:, 1:] != -100
    scores = precise(logits[:, :-1][kept]).log_softmax(-1)
    return -(scores.exp() * scores).sum(-1).mean()


def mean_distance(now: tuple[Tensor, ...], before: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """Mean over depths and tokens of the L2 distance between hidden states, each [batch, sequence, hidden].

    Packed rows come without an attention mask; all their tokens count.
    """
    mask = batch.get("attention_mask")
    kept = (torch.ones_like(batch["input_ids"]) if mask is None else mask).to(now[0].device) != 0
    moved = [precise(a)[kept] - precise(b)[kept] for a, b in zip(now, before, strict=True)]
    distances = [torch.linalg.vector_norm(change, dim=-1).mean() for change in moved]
    return torch.stack(distances).mean()
