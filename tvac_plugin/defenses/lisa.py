"""Lisa (Huang et al., arXiv 2405.18641): a service takes turns between a user's data and alignment data.

    state A, K1 steps    min over w of  L(w; D_alignment) + rho / 2 * ||w - w_user||^2
    state U, K2 steps    min over w of  L(w; D_user)      + rho / 2 * ||w - w_alignment||^2      (Algorithm 1)

w_user and w_alignment are the weights at which the other state ended; both start at the first weights. There is no pull
until more than a tenth of all steps are over, as in the published code. Not to be confused with layer-wise LISA, which
draws layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.fine_tuning import LisaConfig
from tvac_plugin.defenses.base import Defense, Host, Position, StepReport, trainable
from tvac_plugin.model.numerics import norm
from tvac_plugin.model.types import Batch
from tvac_plugin.model.weights import copied

State = Literal["alignment", "user"]
_OTHER: dict[State, State] = {"alignment": "user", "user": "alignment"}


class Lisa(Defense):
    """Lazy safety alignment during a user's fine-tuning.

    A user batch that comes in state A is left out, as in the published code.
    """

    config_class = LisaConfig

    def __init__(self, config: LisaConfig, model: nn.Module, *, seed: int) -> None:
        """Binds the defense to the trainable weights of `model`; `seed` is unused, the batches are seeded."""
        self._config = config
        self._weights = trainable(model)
        self._state: State | None = None
        self._loss = torch.zeros(())
        self._ended_at: dict[State, list[Tensor]] = {}

    def step(self, host: Host, batch: Batch, position: Position) -> StepReport:
        """Trains on the current state's data, pulled towards where the other state ended."""
        if not position.starts_step:
            return StepReport(loss=torch.zeros_like(self._loss) if self._state == "alignment" else host.train(batch))
        self._refuse_alignment_alone(position.num_steps)
        events = self._enter(self._state_at(position.step))
        norms = {}
        if self._pulls(position):
            pull = self._pull()
            host.add_gradients(self._weights, pull)
            if not events:  # where a state begins the weights are still where the other one ended
                norms["pull_norm"] = norm(pull)
        if self._state == "user":
            self._loss = host.train(batch)
        else:
            self._loss, norms["alignment_norm"] = self._align(host, position.step)
        return StepReport(loss=self._loss, norms=norms, events=events)

    def _refuse_alignment_alone(self, num_steps: int) -> None:
        if 0 < num_steps <= self._config.alignment_steps:
            raise UserError(
                f"lisa.alignment_steps: {self._config.alignment_steps} is not less than the {num_steps} steps of "
                "training, so the user's data would never be trained on. Set it lower, and user_steps with it."
            )

    def _state_at(self, step: int) -> State:
        cycle = self._config.alignment_steps + self._config.user_steps
        return "alignment" if step % cycle < self._config.alignment_steps else "user"

    def _enter(self, state: State) -> list[dict[str, Any]]:
        """Changes the state if it is another one, and keeps the weights at which the old one ended."""
        if state == self._state:
            return []
        if self._state is None:
            self._ended_at = {"alignment": copied(self._weights), "user": copied(self._weights)}
        else:
            self._ended_at[self._state] = copied(self._weights)
        self._state = state
        return [{"event": "state", "state": state}]

    def _pulls(self, position: Position) -> bool:
        return self._config.rho > 0 and position.step > self._config.warmup_ratio * position.num_steps

    def _pull(self) -> list[Tensor]:
        """Gradient of the proximal term: rho * (w - w_other)."""
        assert self._state is not None
        anchors = self._ended_at[_OTHER[self._state]]
        pairs = zip(self._weights, anchors, strict=True)
        return [self._config.rho * (weight.detach() - anchor) for weight, anchor in pairs]

    def _align(self, host: Host, step: int) -> tuple[Tensor, Tensor]:
        """One optimizer step's gradient on alignment data; returns the loss and the gradient's norm."""
        with host.auxiliary(replay=False):
            loss = host.mean_loss(host.batch("alignment", step))
            gradients = host.gradients(loss, self._weights)
        host.add_gradients(self._weights, gradients)
        return loss.detach(), norm(gradients)

    def state_dict(self) -> dict[str, Any]:
        """The current state, and the weights at which each state ended."""
        tensors = {f"{state}.{i}": t for state, ts in self._ended_at.items() for i, t in enumerate(ts)}
        return {"state": self._state, **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._state = state["state"]
        if self._state is not None:
            self._ended_at = {
                ended: [state[f"{ended}.{i}"].to(weight.device) for i, weight in enumerate(self._weights)]
                for ended in _OTHER
            }
