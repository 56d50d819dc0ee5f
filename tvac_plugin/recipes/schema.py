"""JSON Schemas of recipes, for editors: of the keys this plugin adds, or of all keys."""

from __future__ import annotations

from typing import Any

from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from tvac_plugin.args import SafetyDefenseArgs


class _Lenient(GenerateJsonSchema):
    """Writes what JSON has no words for as anything: some of Axolotl's settings take `torch.dtype`s and functions."""

    def generate_inner(self, schema: Any) -> JsonSchemaValue:
        try:
            return super().generate_inner(schema)
        except (PydanticInvalidForJsonSchema, ValueError):
            return {}


def plugin_schema() -> dict[str, Any]:
    """The keys that this plugin adds."""
    return SafetyDefenseArgs.model_json_schema()


def recipe_schema() -> dict[str, Any]:
    """All keys of a recipe, Axolotl's and ours; any other key is an error, though Axolotl would drop it silently."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    class Recipe(AxolotlInputConfig, SafetyDefenseArgs):  # type: ignore[misc, valid-type]
        """An Axolotl recipe with a safety defense."""

    return {**Recipe.model_json_schema(schema_generator=_Lenient), "additionalProperties": False}
