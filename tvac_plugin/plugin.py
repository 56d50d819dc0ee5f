"""Axolotl's hooks, in the order Axolotl calls them, translated to ours."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import load_tokenizer
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import get_world_size, is_main_process
from axolotl.utils.logging import get_logger
from datasets import Dataset
from filelock import BaseFileLock
from torch import nn
from transformers import Trainer, set_seed

from tvac_plugin.args import defense_config, simulated_user_config
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import lock_output
from tvac_plugin.boundary.secrets import hide_secrets
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.configs.simulated_user import SimulatedUserConfig
from tvac_plugin.data.fingerprints import data_facts
from tvac_plugin.data.loading import load_rows, load_user_data, other_trainers, training_problems
from tvac_plugin.data.simulated_user import write_manifest
from tvac_plugin.data.sources import prepared_folder, rows_apart, source_hashes
from tvac_plugin.data.taught_answers import decoding
from tvac_plugin.provenance.manifest import MANIFEST_FILE, set_aside
from tvac_plugin.provenance.merged import seal_merged
from tvac_plugin.provenance.record import RunRecord
from tvac_plugin.provenance.run_identity import refuse_other_run, run_facts
from tvac_plugin.recipes.reading import near_misses, wrong_names

LOG = get_logger("axolotl.tvac_plugin")
DEFAULT_SEED = 42
LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class SafetyDefensePlugin(BasePlugin):  # type: ignore[misc]
    """Turns `safety_defense:` in a recipe into a defended training run; does nothing where the key is absent."""

    def __init__(self) -> None:
        """Starts with nothing loaded."""
        super().__init__()
        self._rows: dict[str, Dataset] = {}
        self._record: RunRecord | None = None
        self._lock: BaseFileLock | None = None
        self._user: SimulatedUserConfig | None = None
        self._user_facts: dict[str, Any] = {}
        self._is_main = False
        self._num_ends = 0
        self._rows_apart = ExitStack()

    def register(self, cfg: DictDefault) -> None:
        """Refuses misspelt keys and fills in what a defense needs and Axolotl sets otherwise.

        Raises:
            UserError: A key or a plugin looks like one of ours and is not.
        """
        problems = near_misses(cfg) + wrong_names(cfg)
        if problems:
            raise UserError(" ".join(problems))
        hide_secrets(cfg)
        user = cfg.get("simulated_user")
        if user:
            if cfg.get("datasets"):
                raise UserError("`datasets:` and `simulated_user:` both name the training data. Remove one of them.")
            cfg.datasets = [*(user.get("task_datasets") or []), *(user.get("harmful_datasets") or [])]
        if cfg.get("safety_defense") is None:
            return
        if not torch.cuda.is_available() and all(cfg[kernel] is None for kernel in LORA_KERNELS):
            cfg.update(dict.fromkeys(LORA_KERNELS, False))
        if cfg.safety_defense == "none":
            return
        if cfg.seed is None:
            cfg.seed = DEFAULT_SEED
        if cfg.fa_varlen_kwargs_in_collator is None:
            cfg.fa_varlen_kwargs_in_collator = False
        if cfg.gradient_checkpointing is True and cfg.gradient_checkpointing_kwargs is None:
            cfg.gradient_checkpointing_kwargs = {"use_reentrant": False}

    def get_input_args(self) -> str:
        """Names the schema that Axolotl merges into its own."""
        return "tvac_plugin.args.SafetyDefenseArgs"

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> TrainDatasetMeta | None:
        """Loads what the defense reads and leaves `datasets:` to Axolotl; for an attack, loads the user's data too.

        Raises:
            UserError: Another run writes to the output directory, or nothing can be written there.
            UserError: The recipe cannot be trained with the defense, the checkpoint to resume from is not of this
                run, or the user's data are not as it says.
        """
        config = defense_config(cfg)
        if cfg.safety_defense is not None or cfg.simulated_user is not None:
            cfg.dataset_prepared_path = prepared_folder(cfg)
            self._rows_apart.enter_context(rows_apart(cfg, cfg.dataset_prepared_path))
        if config is not None:
            problems = training_problems(cfg, config, other_trainers=other_trainers(self, cfg))
            if problems:
                raise UserError(" ".join(problems))
            if not preprocess:
                if is_main_process():
                    self._lock = lock_output(Path(cfg.output_dir))
                _choose_checkpoint(cfg, config)
            if config.data_keys():
                tokenizer = load_tokenizer(cfg)
                config.with_tokenizer(tokenizer)  # what it refuses is refused before the model loads
                self._rows = load_rows(cfg, config, tokenizer)
        self._user = simulated_user_config(cfg)
        if self._user is None:
            return None
        user_data, self._user_facts = load_user_data(cfg, self._user, load_tokenizer(cfg))
        return user_data

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Lets go of what `load_datasets` set for Axolotl's own reading, which is over."""
        self._rows_apart.close()

    def pre_lora_load(self, cfg: DictDefault, model: nn.Module) -> None:
        """Seeds the adapter's initialisation, which Axolotl leaves to chance."""
        if cfg.safety_defense is not None or cfg.simulated_user is not None:
            set_seed(DEFAULT_SEED if cfg.seed is None else cfg.seed)

    def get_trainer_cls(self, cfg: DictDefault) -> type[Trainer] | None:
        """Returns the defended trainer while a defense is on."""
        if defense_config(cfg) is None:
            return None
        from tvac_plugin.trainers.axolotl import SafetyDefenseAxolotlTrainer

        return SafetyDefenseAxolotlTrainer

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any] | None:
        """Lets bfloat16 train on a CPU: transformers refuses it there, unless told that no other device is meant."""
        is_ours = cfg.safety_defense is not None or cfg.simulated_user is not None
        is_bfloat16 = cfg.bf16 is True or cfg.bfloat16 is True
        return {"use_cpu": True} if is_ours and is_bfloat16 and not torch.accelerator.is_available() else None

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        """Hands the defense to the trainer.

        Raises:
            UserError: Another plugin's trainer was chosen, or the model or the data cannot be defended.
        """
        self._is_main = is_main_process()
        if self._is_main and (cfg.safety_defense is not None or cfg.simulated_user is not None):
            set_aside(Path(cfg.output_dir))
        config = defense_config(cfg)
        if config is None:
            return
        from tvac_plugin.trainers.mixin import SafetyDefenseMixin

        if not isinstance(trainer, SafetyDefenseMixin):
            raise UserError(
                f"{type(trainer).__name__} was chosen instead of the defended trainer. "
                "Remove the plugin or key that brings it."
            )
        facts = data_facts(trainer.train_dataset, self._rows, decode=decoding(trainer.processing_class))
        facts["sources"] = source_hashes(cfg)
        self._record = RunRecord(config, data=facts, seed=trainer.args.seed, base_model=str(cfg.base_model))
        trainer.configure_defense(config, record=self._record, rows=self._rows)
        self._rows = {}
        LOG.info(f"safety defense on: {cfg.safety_defense} {config.model_dump()}")

    def post_lora_merge(self, cfg: DictDefault, adapter_path: str, output_path: str) -> None:
        """Gives a merged model the proof of its adapter; Axolotl calls it from 0.21 on."""
        if (Path(adapter_path) / MANIFEST_FILE).is_file():
            seal_merged(Path(adapter_path), Path(output_path), method=cfg.merge_method or "memory_efficient")

    def post_train(self, cfg: DictDefault, model: nn.Module) -> None:
        """Counts: Axolotl calls it when training is over, and again when the model is saved."""
        self._num_ends += 1

    def post_train_unload(self, cfg: DictDefault) -> None:
        """Seals the final weights; they are on disk only now, and the processes no longer know of each other.

        From 0.20 on Axolotl also calls it after a failure, when other weights may lie in the folder: then nothing is
        sealed.
        """
        is_saved, self._num_ends = self._num_ends == 2, 0
        if self._user is not None and self._is_main and is_saved:
            write_manifest(Path(cfg.output_dir), self._user, self._user_facts)
        if self._record is not None and is_saved:
            done = self._record.seal(Path(cfg.output_dir))
            if done is not None:
                LOG.info(
                    done, main_process_only=False
                )  # only the main process seals, and asking which it is fails here
        self._user = self._record = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _choose_checkpoint(cfg: DictDefault, config: DefenseConfig) -> None:
    """Resumes automatically from complete checkpoints only, and from none of another run."""
    from tvac_plugin.trainers.checkpoint import load_state, newest_complete

    if cfg.resume_from_checkpoint is None and cfg.auto_resume_from_checkpoints:
        newest = newest_complete(Path(cfg.output_dir))
        cfg.resume_from_checkpoint = None if newest is None else str(newest)
        cfg.auto_resume_from_checkpoints = newest is not None
    if cfg.resume_from_checkpoint:
        checkpoint = Path(cfg.resume_from_checkpoint)
        state = load_state(checkpoint, num_processes=get_world_size())
        refuse_other_run(state.record["run"], run_facts(config, seed=cfg.seed), checkpoint=checkpoint)
        LOG.info(f"resuming from {checkpoint}, with the defense as it was there")
