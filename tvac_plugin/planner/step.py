"""One training step of one defense, run on fake tensors and counted."""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import Trainer, TrainingArguments

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.defenses import Defense, Position, build_defense
from tvac_plugin.model.answer_head import find_answer_head
from tvac_plugin.model.architecture import find_blocks
from tvac_plugin.planner.fake_model import FakeModel
from tvac_plugin.planner.fake_tensors import imagined
from tvac_plugin.planner.host import PlannedHost
from tvac_plugin.planner.ledger import Cost, Ledger
from tvac_plugin.planner.workload import Workload

_FIRST = Position(0, starts_step=True)
_TOGETHER = ("adamw_torch", "sgd")
"""Optimizers of PyTorch that update all parameters at a time on a GPU, and one by one on a CPU unless told."""


class _AnyToken:
    """Stands for a tokenizer: which token a text is changes no cost."""

    unk_token, unk_token_id = None, None

    def __call__(self, _text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [0]}


class StepCounter:
    """Runs steps of a model that was built once."""

    def __init__(self, model: FakeModel, workload: Workload, data_keys: Set[str]) -> None:
        """Sets up the optimizer's state, which is there from the second step on.

        Args:
            model: The fake model.
            workload: Sizes and precision.
            data_keys: Keys under which the recipe names data.

        Raises:
            UserError: The optimizer's state cannot be counted.
        """
        self._model = model
        self._workload = workload
        self._data_keys = data_keys
        self._optimizer = self._filled_optimizer()
        with imagined(model.mode):
            self._answer_head = find_answer_head(model.module)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(find_blocks(self._model.module))

    @property
    def num_trainable(self) -> int:
        """Parameters that learn."""
        return sum(parameter.numel() for parameter in self._model.trainable())

    def count(
        self, config: DefenseConfig | None, *, position: Position = _FIRST, state: Mapping[str, Any] | None = None
    ) -> Cost:
        """Counts one micro-batch and the optimizer's step after it; with accumulation, the second micro-batch's peak.

        Args:
            config: The defense, `None` for supervised fine-tuning.
            position: Where training stands at the first of these micro-batches.
            state: The defense's state at that moment.

        Raises:
            UserError: The model, or the defense, does what depends on data.
        """
        known = None if config is None else config.with_tokenizer(_AnyToken())
        defense = None if known is None else build_defense(known, self._model.module, seed=0)
        if defense is not None and state is not None:
            defense.load_state_dict(state)
        ledger = self._ledger()
        host = PlannedHost(
            self._model.module,
            self._workload,
            ledger,
            stream_sizes={} if config is None else config.streams(),
            data_keys=self._data_keys,
            answer_head=None if defense is None else self._answer_head,
        )
        flops = 0
        try:
            with ExitStack() as stack:
                stack.enter_context(imagined(self._model.mode, ledger, answer_share=self._workload.answer_share))
                stack.enter_context(ledger.watching(self._model.trainable()))
                stack.enter_context(host.told_apart())
                for micro in range(min(2, self._workload.accumulation)):
                    _micro_batch(
                        host,
                        defense,
                        self._workload,
                        position._replace(starts_step=position.starts_step and micro == 0),
                    )
                    flops = flops or ledger.cost.flops
                ledger.making = "temporary"
                self._optimizer.step()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"{type(self._model.module).__name__} cannot be planned: what it computes depends on data ({error})."
            ) from error
        finally:
            self._model.module.zero_grad(set_to_none=True)
        return ledger.cost._replace(flops=flops)

    def _ledger(self) -> Ledger:
        ledger = Ledger()
        ledger.own(self._model.frozen(), "weights")
        ledger.own(self._model.trainable(), "adapters" if self._workload.adapter else "weights")
        states = (value for state in self._optimizer.state.values() for value in state.values())
        ledger.own((value for value in states if isinstance(value, torch.Tensor)), "optimizer")
        return ledger

    def _filled_optimizer(self) -> torch.optim.Optimizer:
        parameters = self._model.trainable()
        optimizer = _optimizer(parameters, self._workload.optimizer, self._model.module)
        try:
            with imagined(self._model.mode):
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
                optimizer.step()
        except Exception as error:
            raise UserError(
                f"optimizer: the state of {self._workload.optimizer} cannot be counted ({error}). "
                "Plan with adamw_torch_fused."
            ) from error
        finally:
            self._model.module.zero_grad(set_to_none=True)
        return optimizer


def _micro_batch(host: PlannedHost, defense: Defense | None, workload: Workload, position: Position) -> None:
    batch = host.fake_batch(workload.batch_size)
    if defense is None:
        host.train(batch)
    else:
        defense.step(host, batch, position)


def _optimizer(parameters: list[nn.Parameter], name: str, model: nn.Module) -> torch.optim.Optimizer:
    try:
        arguments = TrainingArguments(output_dir="unused", optim=name, use_cpu=True, report_to="none")
        made = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        more = {"foreach": True} if name in _TOGETHER else {}
        optimizer = made[0](parameters, **{**made[1], **more})
    except Exception as error:
        raise UserError(f"optimizer: {name} cannot be counted ({error}). Plan with adamw_torch_fused.") from error
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
