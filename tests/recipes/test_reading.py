"""What Axolotl would drop without a word, the raw recipe still shows."""

from __future__ import annotations

import pytest

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.check import recipe_problems
from tvac_plugin.recipes import reading
from tvac_plugin.recipes.reading import near_misses, plugin_problems, read_recipe


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("safety_defence", "safety_defense"),
        ("safety-defense", "safety_defense"),
        ("saftey_defense", "safety_defense"),
        ("t-vaccine", "t_vaccine"),
        ("tvaccine", "t_vaccine"),
        ("T_Vaccine", "t_vaccine"),
        ("harmful_dataset", "harmful_datasets"),
        ("vacine", "vaccine"),
    ],
)
def test_a_near_miss_names_the_key_that_was_meant(key, meant):
    assert near_misses({key: 1}) == [f"`{key}:` is not a key of this plugin. Did you mean `{meant}:`?"]


def test_one_slip_in_the_defense_s_own_key_is_one_problem(workspace, tmp_path):
    recipe = workspace.recipe(tmp_path)
    recipe["safety_defence"] = recipe.pop("safety_defense")
    assert recipe_problems(recipe) == ["`safety_defence:` is not a key of this plugin. Did you mean `safety_defense:`?"]


def test_our_own_keys_and_all_of_axolotl_s_are_no_near_misses():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    from tvac_plugin.args import SafetyDefenseArgs

    assert near_misses(dict.fromkeys([*AxolotlInputConfig.model_fields, *SafetyDefenseArgs.model_fields], 1)) == []


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        (None, r"not loaded, so nothing is defended. Add `plugins: \[tvac_plugin.SafetyDefensePlugin\]`"),
        ([], "not loaded"),
        (["axolotl.integrations.liger.LigerPlugin"], "not loaded"),
        (["tvac_plugins.SafetyDefensePlugin"], "is not this plugin's name. Write `tvac_plugin.SafetyDefensePlugin`"),
        (["tvac_plugin.SafetyDefencePlugin"], "is not this plugin's name"),
        (["tvac_plugin.plugin.SafetyDefensePlugin"], "is not this plugin's name"),
        (["tvac_plugin:SafetyDefensePlugin"], "is not this plugin's name"),
        ("tvac_plugin.SafetyDefensePlugin", "must be a list"),
    ],
)
def test_a_plugin_that_would_not_load_is_a_problem(plugins, message, monkeypatch):
    import re

    monkeypatch.setattr(reading, "loads_installed_plugins", lambda: False)
    (problem,) = plugin_problems({"plugins": plugins})
    assert re.search(message, problem)


def test_the_plugin_beside_others_is_fine():
    assert plugin_problems({"plugins": ["x.Y", "tvac_plugin.SafetyDefensePlugin"]}) == []


@pytest.mark.parametrize("plugins", [None, [], ["axolotl.integrations.liger.LigerPlugin"]])
def test_an_installed_plugin_needs_no_line_where_axolotl_loads_those(plugins, monkeypatch):
    monkeypatch.setattr(reading, "loads_installed_plugins", lambda: True)
    assert plugin_problems({"plugins": plugins}) == []
    assert plugin_problems({"plugins": ["tvac_plugin.SafetyDefencePlugin"]}) != []


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("a: [1", "not valid YAML"), ("- a\n- b\n", "not a recipe"), ("", "not a recipe")],
)
def test_an_unreadable_recipe_says_why(tmp_path, content, message):
    path = tmp_path / "r.yml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"r.yml: {message}"):
        read_recipe(path)
