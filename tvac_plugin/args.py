"""The YAML surface: every key a recipe may set. The blocks' own keys are in `tvac_plugin.configs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, create_model, field_validator, model_validator

from tvac_plugin.boundary.errors import UserError, did_you_mean, explain, shown
from tvac_plugin.boundary.files import refuse_unwritable
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.configs.base import DATA_KEYS, DefenseConfig, example_entry
from tvac_plugin.configs.refusals import conflicts
from tvac_plugin.configs.simulated_user import SimulatedUserConfig

NAMES = ("none", *DEFENSE_CONFIGS)


def _data_field(key: str) -> Any:
    readers = [name for name, config in DEFENSE_CONFIGS.items() if key in config().data_keys()]
    text = f"{DATA_KEYS[key][0].upper()}{DATA_KEYS[key][1:]}"
    return Field(
        default=None,
        min_length=1,
        description=f"{text}; entries as in `datasets:`. Read by {', '.join(readers)}. Default: absent.",
    )


class _Keys(BaseModel):
    """The keys this plugin adds to an Axolotl recipe."""

    safety_defense: str | None = Field(
        default=None,
        description=f"The defense to train with: {', '.join(NAMES)}, or the import path of your own, as "
        "`package.module.Class`. `none` trains undefended from the same adapter as a defended run; without the key "
        "the plugin does nothing. Default: absent.",
    )
    harmful_datasets: list[dict[str, Any]] | None = _data_field("harmful_datasets")
    refusal_datasets: list[dict[str, Any]] | None = _data_field("refusal_datasets")
    retain_datasets: list[dict[str, Any]] | None = _data_field("retain_datasets")
    alignment_datasets: list[dict[str, Any]] | None = _data_field("alignment_datasets")
    custom_defense: dict[str, Any] | None = Field(
        default=None, description="Settings of a defense of your own, named in `safety_defense:` by its import path."
    )
    simulated_user: SimulatedUserConfig | None = Field(
        default=None, description="Train on a simulated user's data instead of `datasets:`; makes the recipe an attack."
    )

    @field_validator("safety_defense", mode="before")
    @classmethod
    def _refuse_unknown_defense(cls, value: Any) -> Any:
        if value is None or value in NAMES or (isinstance(value, str) and "." in value):
            return value
        written = shown(value).strip("'")
        raise UserError(f"safety_defense: `{written}` is not a defense.{did_you_mean(written, NAMES)}")

    @model_validator(mode="after")
    def _refuse_what_cannot_work(self) -> Self:
        problems = defense_problems(self.__dict__) + _output_problems(self.__dict__)
        if problems:
            raise UserError("the safety defense cannot run with this recipe:\n- " + "\n- ".join(problems))
        return self


def _block_field(name: str) -> Any:
    return Field(default=None, description=f"Settings of `safety_defense: {name}`.")


_BLOCKS: dict[str, Any] = {name: (config | None, _block_field(name)) for name, config in DEFENSE_CONFIGS.items()}
SafetyDefenseArgs = create_model("SafetyDefenseArgs", __base__=_Keys, __doc__=_Keys.__doc__, **_BLOCKS)
"""The schema that Axolotl merges into its own: `_Keys` and one block for each defense."""


def defense_problems(recipe: dict[str, Any]) -> list[str]:
    """Lists why the defense that `recipe` asks for cannot run with it, one sentence each with the way out."""
    name = recipe.get("safety_defense")
    if name is None:
        return _blocks_without_defense(recipe)
    if name == "none":
        return []
    try:
        config = defense_config(recipe)
    except ValidationError as error:
        return explain(error, block=str(name) if name in DEFENSE_CONFIGS else "custom_defense")
    except ValueError as error:
        return [str(error)]
    assert config is not None
    if config.stage == "alignment" and recipe.get("simulated_user"):
        return [
            f"`simulated_user:` is an attack, and {name} defends alignment. Set `safety_defense: none`, or lisa, "
            "which defends while a user trains."
        ]
    if "." not in name and recipe.get("custom_defense") is not None:
        return ["`custom_defense:` is for a defense of your own, and none is named. Remove the block."]
    return (
        conflicts(recipe)
        + config.effect_problems()
        + _adapter_problems(config, recipe)
        + [
            f"{name} needs {DATA_KEYS[key]}. Add `{example_entry(key)}`."
            for key, is_required in config.data_keys().items()
            if is_required and not recipe.get(key)
        ]
    )


def _adapter_problems(config: DefenseConfig, recipe: dict[str, Any]) -> list[str]:
    if not config.needs_adapter or recipe.get("adapter"):
        return []
    return [
        f"`adapter` must name one: {config.block} compares the model with its adapter and without it. Add "
        "`adapter: lora`."
    ]


def defense_advice(recipe: dict[str, Any]) -> list[str]:
    """Lists what would bring the defense of a valid recipe closer to what its paper tested."""
    config = defense_config(recipe)
    return [] if config is None else config.advice([key for key in DATA_KEYS if recipe.get(key)])


def _output_problems(recipe: dict[str, Any]) -> list[str]:
    """Only Axolotl's merged schema has the key; its log is written there before the next hook of a plugin."""
    is_ours = recipe.get("safety_defense") is not None or recipe.get("simulated_user") is not None
    if not is_ours or recipe.get("output_dir") is None:
        return []
    try:
        refuse_unwritable(Path(recipe["output_dir"]))
    except UserError as error:
        return [str(error)]
    return []


def _blocks_without_defense(recipe: dict[str, Any]) -> list[str]:
    ours = [key for key in (*DATA_KEYS, *DEFENSE_CONFIGS, "custom_defense") if recipe.get(key) is not None]
    return [
        f"`{key}:` is set but `safety_defense:` is not, so nothing would be defended. "
        f"Add `safety_defense: {key if key in DEFENSE_CONFIGS else 't_vaccine'}` or remove the block."
        for key in ours
    ]


def simulated_user_config(recipe: dict[str, Any]) -> SimulatedUserConfig | None:
    """Returns the attack of a validated recipe, `None` for none."""
    block = recipe.get("simulated_user")
    return None if block is None else SimulatedUserConfig.model_validate(_plain(block))


def defense_config(recipe: dict[str, Any]) -> DefenseConfig | None:
    """Returns the settings of the defense that a validated recipe selects, `None` for none.

    Raises:
        UserError: `safety_defense:` names a class that cannot be imported, or is not a defense.
        pydantic.ValidationError: The settings do not fit it.
    """
    name = recipe.get("safety_defense")
    if name in (None, "none"):
        return None
    if name in DEFENSE_CONFIGS:
        return DEFENSE_CONFIGS[name].model_validate(_plain(recipe.get(name) or {}))
    from tvac_plugin.defenses.custom import import_defense

    return import_defense(str(name)).config_class.model_validate(_plain(recipe.get("custom_defense") or {}))


def _plain(value: Any) -> Any:
    """Copies Axolotl's nested dictionaries, which are a class of their own, to plain ones."""
    if isinstance(value, BaseModel):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
