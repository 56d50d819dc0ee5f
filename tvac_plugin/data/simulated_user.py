"""A simulated user's training data: rows of a benign task, with an exact share of harmful ones among them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import write_json
from tvac_plugin.configs.simulated_user import SimulatedUserConfig
from tvac_plugin.data.fingerprints import prompt_keys, rows_hash
from tvac_plugin.provenance.model_files import weight_hashes

USER_FILE = "simulated_user.json"


class UserData(NamedTuple):
    """What the simulated user trains on.

    Attributes:
        rows: `num_samples` tokenized rows in the user's order.
        facts: Counts and hashes for the manifest.
    """

    rows: Dataset
    facts: dict[str, Any]


def compose(
    config: SimulatedUserConfig,
    *,
    task: Dataset | None,
    harmful: Dataset | None,
    protected: Mapping[str, Dataset],
    rewritten: Dataset | None = None,
) -> UserData:
    """Draws and mixes the user's rows; the same seed and pools give the same rows in the same order.

    Args:
        config: How many rows of which kind.
        task: Tokenized rows of the benign task.
        harmful: Tokenized harmful rows.
        rewritten: The harmful rows with their prompts transformed, which are trained in their place; what is protected
            is asked plainly, so that is what the harmful rows are held against.
        protected: Tokenized data whose prompts must not be among the user's, by the name to call it in an error.

    Raises:
        UserError: A pool has too few rows, or shares prompts with protected data, or rewritten rows were cut off.
    """
    if rewritten is not None and harmful is not None and len(rewritten) != len(harmful):
        raise UserError(
            f"simulated_user.prompt_transform: {len(harmful) - len(rewritten)} rewritten rows are too long and were "
            "dropped. Raise `sequence_len:`."
        )
    rng = random.Random(config.seed)
    parts, facts = [], {}
    pools = (("task_datasets", task, config.num_task), ("harmful_datasets", harmful, config.num_harmful))
    for key, pool, count in pools:
        if count == 0 or pool is None:
            continue
        kept = _disjoint(key, pool, protected, drop=config.drop_overlap)
        if len(kept) < count:
            raise UserError(
                f"simulated_user.{key}: {count} rows are asked for and {len(kept)} are there. "
                "Add data, or lower num_samples or harmful_ratio."
            )
        trained = rewritten if key == "harmful_datasets" and rewritten is not None else pool
        drawn = trained.select(rng.sample(kept, count))
        facts[key] = {"rows": count, "left_out": len(pool) - len(kept), "sha256": rows_hash(drawn)}
        parts.append(drawn.select_columns(["input_ids", "attention_mask", "labels"]))
    mixed = concatenate_datasets(parts)
    order = list(range(len(mixed)))
    rng.shuffle(order)
    return UserData(mixed.select(order), facts)


def write_manifest(output_dir: Path, config: SimulatedUserConfig, facts: Mapping[str, Any]) -> None:
    """Writes what the user trained on beside the weights that came out."""
    manifest = {
        "num_samples": config.num_samples,
        "harmful_ratio": config.harmful_ratio,
        "seed": config.seed,
        "prompt_transform": None if config.prompt_transform is None else config.prompt_transform.model_dump(),
        "data": dict(facts),
        "weights": weight_hashes(output_dir),
    }
    write_json(output_dir / USER_FILE, manifest)


def _disjoint(key: str, pool: Dataset, protected: Mapping[str, Dataset], *, drop: bool) -> list[int]:
    keys = prompt_keys(pool)
    forbidden: set[str] = set()
    for name, rows in protected.items():
        others = set(prompt_keys(rows))
        shared = len(others.intersection(keys))
        if shared and not drop:
            raise UserError(
                f"simulated_user.{key}: {shared} of its prompts are also in {name}. "
                "Take disjoint rows, for example with `split:`, or set `drop_overlap: true`."
            )
        forbidden |= others
    return [index for index, prompt in enumerate(keys) if prompt not in forbidden]
