"""What goes into a model and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

Batch = Mapping[str, Any]
"""Model inputs with `labels`; tensors of shape [batch, sequence]."""


class Outputs(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits: [batch, sequence, vocabulary].
        hidden_states: The residual stream before each layer and, normed, after the last; each
            [batch, sequence, hidden]. Empty unless asked for.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()


class Pair(NamedTuple):
    """The same prompts answered twice, padded on the right to one length.

    Attributes:
        first: Rows of the stream's own key, the harmful answers.
        second: Rows of the key it is paired with, the refusals.
    """

    first: Batch
    second: Batch
