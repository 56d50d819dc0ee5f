"""The trainer that the plugin registers: Axolotl's trainer and TRL's `SFTTrainer` at once, with a defense.

TRL's trainer sits at the tail of the bases behind a shim, because its constructor, its column pruning and its model
card expect TRL's own arguments and data preparation, and Axolotl brings its own. Import this module only when a
trainer is built: Axolotl fixes the class of its training arguments at the first import of `core.training_args`.
"""

from __future__ import annotations

import contextlib
from dataclasses import MISSING, dataclass, fields
from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.utils.samplers.multipack import MultipackBatchSampler
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from tvac_plugin.model.types import Batch
from tvac_plugin.trainers.mixin import SafetyDefenseMixin

_PREPARED_BY_AXOLOTL = {
    "loss_type": "nll",
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "max_length": None,
    "packing": False,
    "eval_packing": False,
    "padding_free": False,
    "completion_only_loss": False,
    "assistant_only_loss": False,
    "shuffle_dataset": False,
}


@dataclass
class AxolotlSFTConfig(AxolotlTrainingArguments, SFTConfig):  # type: ignore[misc]
    """Axolotl's training arguments that TRL accepts as its own."""

    @classmethod
    def adopt(cls, args: AxolotlTrainingArguments) -> AxolotlSFTConfig:
        """Copies `args` as they are; running their checks again would set up devices and plugins twice."""
        adopted: AxolotlSFTConfig = cls.__new__(cls)
        for field in fields(SFTConfig):
            if field.default is not MISSING:
                adopted.__dict__[field.name] = field.default
            elif field.default_factory is not MISSING:
                adopted.__dict__[field.name] = field.default_factory()
        adopted.__dict__.update(args.__dict__)
        adopted.__dict__.update(_PREPARED_BY_AXOLOTL)
        return adopted


class _SFTTrainerBehindAxolotl(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` that leaves data, columns, loss and checkpoints to Axolotl."""

    def __init__(self, model: nn.Module, args: AxolotlTrainingArguments, **kwargs: Any) -> None:
        dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, AxolotlSFTConfig.adopt(args), **kwargs)
        for name, parameter in model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])
        self.maybe_activation_offload_context = contextlib.nullcontext()

    def _set_signature_columns_if_needed(self) -> None:
        Trainer._set_signature_columns_if_needed(self)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, *args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.prediction_step(self, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        Trainer.create_model_card(self, *args, **kwargs)


class SafetyDefenseAxolotlTrainer(SafetyDefenseMixin, AxolotlTrainer, _SFTTrainerBehindAxolotl):  # type: ignore[misc]
    """What `axolotl train` uses while a defense is on."""

    reads_logits = False
    _packed: MultipackBatchSampler | None = None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        self._packed = sampler if isinstance(sampler, MultipackBatchSampler) else None
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Packs anew for this epoch: a resumed run would go on with the bins that were packed to count them."""
        if self._packed is not None:
            self._packed.set_epoch(kwargs["epoch"])
            if hasattr(self._packed.sampler, "set_epoch"):
                self._packed.sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def auxiliary_loss(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        """Loss through Axolotl's own `compute_loss`, with its token count held still."""
        counted, self.args.include_tkps = self.args.include_tkps, False
        try:
            loss = self.compute_loss(model, dict(batch), num_items_in_batch=num_items)
        finally:
            self.args.include_tkps = counted
        assert isinstance(loss, Tensor)
        return loss
