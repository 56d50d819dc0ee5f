"""`trl.SFTTrainer` with a defense, for people who train without Axolotl."""

from __future__ import annotations

from inspect import signature
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from trl import SFTTrainer

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.hosts import sft_trainer_leaves_prompts_out
from tvac_plugin.configs.base import DATA_KEYS, DefenseConfig
from tvac_plugin.data.fingerprints import data_facts
from tvac_plugin.data.taught_answers import decoding
from tvac_plugin.defenses import defense_name
from tvac_plugin.model.answer_head import AnswerHead
from tvac_plugin.model.types import Batch
from tvac_plugin.provenance.record import RunRecord
from tvac_plugin.trainers.mixin import SafetyDefenseMixin


class SafetyDefenseSFTTrainer(SafetyDefenseMixin, SFTTrainer):  # type: ignore[misc]
    """Supervised fine-tuning on alignment data, made hard to undo by a defense.

    Example:
        ```python
        trainer = SafetyDefenseSFTTrainer(
            model=model, args=SFTConfig("aligned"), train_dataset=alignment, processing_class=tokenizer,
            defense=TVaccineConfig(rho=3.0, num_active_layers=8), harmful_dataset=harmful,
        )
        ```
    """

    def __init__(
        self,
        *args: Any,
        defense: DefenseConfig | None = None,
        harmful_dataset: Dataset | None = None,
        refusal_dataset: Dataset | None = None,
        retain_dataset: Dataset | None = None,
        alignment_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        """Builds the trainer; all other arguments are `SFTTrainer`'s.

        Args:
            *args: `SFTTrainer`'s.
            defense: Settings of the defense; `None` trains exactly as `SFTTrainer` does.
            harmful_dataset: Harmful prompts with harmful answers, in any format that `train_dataset` may have.
            refusal_dataset: Refusals of the same prompts.
            retain_dataset: Benign prompts with answers.
            alignment_dataset: Harmful prompts with refusals, for defenses of a user's fine-tuning.
            **kwargs: `SFTTrainer`'s.

        Raises:
            UserError: The defense needs data and has none, or cannot work with this model or these arguments.
        """
        super().__init__(*args, **kwargs)
        if defense is None:
            return
        self._refuse_reentrant_checkpointing()
        given = {
            "harmful_datasets": harmful_dataset,
            "refusal_datasets": refusal_dataset,
            "retain_datasets": retain_dataset,
            "alignment_datasets": alignment_dataset,
        }
        rows = {key: self._rows(defense, key, given[key]) for key in defense.data_keys()}
        present = {key: prepared for key, prepared in rows.items() if prepared is not None}
        base_model = getattr(self.accelerator.unwrap_model(self.model).config, "_name_or_path", "")
        given_rows = signature(SFTTrainer.__init__).bind(self, *args, **kwargs).arguments["train_dataset"]
        facts = data_facts(self._unpacked(given_rows), present, decode=decoding(self.processing_class))
        record = RunRecord(defense, data=facts, seed=self.args.seed, base_model=base_model)
        self.configure_defense(defense, record=record, rows=present)

    def auxiliary_loss(self, model: nn.Module, batch: Batch, num_items: Tensor | int | None) -> Tensor:
        """Loss with the inputs that `SFTTrainer.compute_loss` adds, without its metrics."""
        extra = {"use_cache": False} | ({"output_router_logits": True} if self.aux_loss_enabled else {})
        return super().auxiliary_loss(model, {**batch, **extra}, num_items)

    def _find_answer_head(self, model: nn.Module) -> AnswerHead | None:
        """The head, where `SFTTrainer` calls it."""
        return None if sft_trainer_leaves_prompts_out() else super()._find_answer_head(model)

    def _unpacked(self, given: Dataset) -> Dataset:
        """The training rows one by one: in a pack no harmful row could be found."""
        if not self.args.packing:
            return self.train_dataset
        return self._prepare_dataset(given, self.processing_class, self.args, False, self._formatting_func, "train")

    def _refuse_reentrant_checkpointing(self) -> None:
        options = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and options.get("use_reentrant"):
            raise UserError(
                "reentrant gradient checkpointing hides the gradients that the defense reads. "
                "Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    def _rows(self, defense: DefenseConfig, key: str, dataset: Dataset | None) -> Dataset | None:
        argument = key.removesuffix("s")
        if isinstance(dataset, IterableDataset):
            raise UserError(
                f"{argument} streams, and {defense_name(defense)} reads its rows again and again. Pass a `Dataset`, as "
                "`Dataset.from_list(list(rows))`."
            )
        if dataset is None or len(dataset) == 0:
            if defense.data_keys()[key]:
                raise UserError(f"{defense_name(defense)} needs {DATA_KEYS[key]}. Pass them in a non-empty {argument}.")
            return None
        limit = defense.row_limit(key)
        if limit is not None:
            dataset = dataset.select(range(min(limit, len(dataset))))
        return self._prepare_dataset(dataset, self.processing_class, self.args, False, self._formatting_func, argument)
