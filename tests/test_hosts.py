"""What `axolotl train` does with a recipe that gets the plugin wrong: another thing in each version of Axolotl.

`docs/explanation/how-you-could-be-fooled.md` is written from the table here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import yaml
from click.testing import CliRunner

import tvac_plugin
from tests.support.workspace import PLUGIN, axolotl_train
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.hosts import loads_installed_plugins
from tvac_plugin.cli import tvac
from tvac_plugin.provenance.manifest import verify

UNDEFENDED, DEFENDED = "trains without a defense, without an error", "trains with the defense"
NAME = f"stops: Write `{PLUGIN}`"


class Mistake(NamedTuple):
    """One way to get the plugin wrong.

    Attributes:
        what: The mistake, as the docs say it.
        changes: To a recipe that is right.
        older: What Axolotl 0.19 and 0.20 do.
        newer: What 0.21 does. After "stops: " stands a part of the message.
    """

    what: str
    changes: dict[str, Any]
    older: str
    newer: str


MISTAKES = [
    Mistake("no line in `plugins:`", {"plugins": None}, UNDEFENDED, DEFENDED),
    Mistake("the same, with another plugin there", {"plugins": ["axolotl.integrations.liger.LigerPlugin"]},
            UNDEFENDED, DEFENDED),
    Mistake("the package is misspelt in `plugins:`", {"plugins": [PLUGIN.replace("tvac", "tvacc")]},
            UNDEFENDED, "stops: No module named 'tvacc_plugin'"),
    Mistake("the class is misspelt in `plugins:`", {"plugins": [PLUGIN.replace("fense", "fence")]},
            "stops: Did you mean `SafetyDefensePlugin`", "stops: Did you mean `SafetyDefensePlugin`"),
    Mistake("the plugin is named by its module", {"plugins": [PLUGIN.replace(".", ".plugin.")]}, NAME, NAME),
    Mistake("no line in `plugins:`, and `safety_defense` is misspelt",
            {"plugins": None, "safety_defense": None, "safety_defence": "t_vaccine"},
            UNDEFENDED, "stops: Did you mean `safety_defense:`"),
    Mistake("no line in `plugins:`, and a key of the defense's block is misspelt",
            {"plugins": None, "t_vaccine": {"roh": 3.0}}, UNDEFENDED, "stops: unknown key `roh`"),
    Mistake("no line in `plugins:`, and `safety_defense` is not there", {"plugins": None, "safety_defense": None},
            UNDEFENDED, "stops: so nothing would be defended"),
]  # fmt: skip
EACH = pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.what for mistake in MISTAKES])


def here(mistake: Mistake) -> str:
    """What this version does."""
    return mistake.newer if loads_installed_plugins() else mistake.older


@EACH
def test_training_stops_or_is_defended_or_is_not_as_the_table_says(workspace, tmp_path, mistake):
    recipe = workspace.recipe(tmp_path / "out", **mistake.changes)
    outcome, _, says = here(mistake).partition("stops: ")
    if says:
        with pytest.raises((ValueError, ImportError, AttributeError), match=says):
            axolotl_train(recipe)
        return
    output = axolotl_train(recipe)
    if outcome == DEFENDED:
        assert verify(output, defense="t_vaccine")["defended_steps"] == 4
        return
    with pytest.raises(UserError, match="not found, so nothing shows that this model was defended"):
        verify(output)


@EACH
def test_check_accepts_no_recipe_that_would_train_without_its_defense(workspace, tmp_path, mistake):
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(workspace.recipe(tmp_path / "out", **mistake.changes)))
    result = CliRunner().invoke(tvac, ["check", str(path)])
    assert (result.exit_code == 0) is (here(mistake) == DEFENDED), result.output


@pytest.mark.parametrize("plugins", [[PLUGIN], None])
def test_a_plugin_that_cannot_be_loaded_ends_training(workspace, tmp_path, monkeypatch, plugins):
    def broken(_name):
        raise ImportError("no module named cryptography")

    monkeypatch.setattr(tvac_plugin, "import_module", broken)
    if plugins is None and not loads_installed_plugins():
        pytest.skip("this version of Axolotl loads no plugin without a line")
    with pytest.raises(SystemExit, match="SafetyDefensePlugin cannot be loaded: no module named cryptography"):
        axolotl_train(workspace.recipe(tmp_path / "out", plugins=plugins))
    assert not (tmp_path / "out").exists()
