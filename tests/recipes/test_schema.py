"""An editor that has the schema accepts every recipe of ours and names what Axolotl would drop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from tvac_plugin.recipes.schema import plugin_schema, recipe_schema

ROOT = Path(__file__).parent.parent.parent
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yml")) if "base_model:" in path.read_text()]


@pytest.fixture(scope="module")
def validator():
    schema = recipe_schema()
    Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(validator, path):
    assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"saftey_defense": "t_vaccine"}, "saftey_defense"),
        ({"gradient_acumulation_steps": 2}, "gradient_acumulation_steps"),
        ({"t_vaccine": {"roh": 3.0}}, "roh"),
        ({"t_vaccine": {"rho": "three"}}, "three"),
        ({"micro_batch_size": "many"}, "many"),
    ],
)
def test_what_would_be_dropped_or_refused_is_named(validator, change, named):
    recipe = yaml.safe_load((ROOT / "recipes" / "tvaccine_tiny.yml").read_text()) | change
    messages = [str(error.message) + str(list(error.context or ())) for error in validator.iter_errors(recipe)]
    assert any(named in message for message in messages), messages


def test_the_plugin_s_keys_alone_are_a_schema_too():
    assert {"safety_defense", "t_vaccine", "harmful_datasets"} <= plugin_schema()["properties"].keys()
