"""A plain host that remembers its passes."""

from __future__ import annotations

from typing import Any

from tvac_plugin.defenses.testing import PlainHost


class WatchedHost(PlainHost):
    """Keeps the names of the passes it was asked for."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.passes: list[str] = []

    def loss(self, batch, *, of=None):
        self.passes.append("loss")
        return super().loss(batch, of=of)

    def train(self, batch):
        self.passes.append("train")
        loss = self._mean_loss(batch)
        loss.backward()
        return loss.detach()
