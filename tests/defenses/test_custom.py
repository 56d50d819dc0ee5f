"""The defense of the how-to, as a user would save it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.workspace import axolotl_train, trace
from tvac_plugin.args import defense_config
from tvac_plugin.chain.jobs import Job
from tvac_plugin.chain.state import fingerprint
from tvac_plugin.check import check_recipe, own_problems
from tvac_plugin.defenses import build_defense
from tvac_plugin.provenance.manifest import verify
from tvac_plugin.recipes.reading import plugin_problems

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-defense.md"
CODE, TEST = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
KEYS = {"safety_defense": "push_away.PushAway", "t_vaccine": None}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the file of the how-to, which is not on the import path."""
    (tmp_path / "push_away.py").write_text(CODE)
    (tmp_path / "half_done.py").write_text(
        "from tvac_plugin.defenses import Defense\nclass Thing: pass\nclass Less(Defense): pass\n"
        "class Half(Defense):\n    def __init__(self, config, model, *, seed): pass\n"
        "    def step(self, host, batch, position): pass\n"
        "from tvac_plugin.defenses import Booster\nclass Mine(Booster): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("push_away", None)


def test_it_is_short():
    assert len(CODE.splitlines()) < 60


def test_the_page_s_test_passes(here, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    names = {}
    exec(compile(TEST, "test_push_away.py", "exec"), names)
    names["test_the_push_is_added_to_the_gradient"]()


def test_the_page_s_recipe_is_accepted(here):
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1))
    assert own_problems(shown) == plugin_problems(shown) == []
    assert defense_config(shown).scale == 0.05


def test_a_recipe_trains_with_it(workspace, here):
    recipe = workspace.recipe(here / "out", custom_defense={"scale": 0.05, "batch_size": 2}, **KEYS)
    assert check_recipe(recipe).problems == []
    output = axolotl_train(recipe)
    manifest = verify(output, defense="push_away.PushAway")
    assert manifest["defended_steps"] == 4
    assert manifest["settings"] == {"scale": 0.05, "batch_size": 2}
    assert manifest["data"]["harmful_datasets"]["rows"] == 12
    assert all(line["safety/push_norm"] > 0 for line in trace(output) if line["event"] == "step")
    assert str(here) not in sys.path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safety_defense": "push_awy.PushAway"}, "push_awy.PushAway cannot be imported: ModuleNotFoundError.*Write"),
        ({"safety_defense": "push_away.PushAwy"}, "push_away has no `PushAwy`. Write `safety_defense: module.Class`"),
        ({"safety_defense": "half_done.Thing"}, "is not a subclass of tvac_plugin.defenses.Defense. Make it one"),
        ({"safety_defense": "half_done.Less"}, "half_done.Less leaves out `__init__`, `step`. Write that"),
        ({"safety_defense": "half_done.Half"}, "half_done.Half has no `config_class`. Set it to a subclass"),
        ({"safety_defense": "half_done.Mine"}, "shares its `config_class` with another defense. Give it one"),
        ({"custom_defense": {"scal": 1.0}}, "custom_defense: unknown key `scal`. Did you mean `scale`?"),
        ({"custom_defense": {"scale": "much"}}, "custom_defense.scale: Input should be a valid number"),
        ({"custom_defense": {"scale": "1e-4"}}, "custom_defense.scale: .*reads it as text. Write `scale: 0.0001`"),
        ({"harmful_datasets": None}, "push_away.PushAway needs harmful prompts.*Add `harmful_datasets"),
        ({"safety_defense": "vaccine", "custom_defense": {}}, "none is named. Remove the block"),
    ],
)
def test_mistakes_are_found_before_training(workspace, here, changes, message):
    problems = check_recipe(workspace.recipe(here / "out", **KEYS | changes), with_data=False).problems
    assert any(re.search(message, problem) for problem in problems), problems


def test_it_can_be_built_from_its_settings_alone(here):
    from tests.support.models import tiny_model

    config = defense_config({"safety_defense": "push_away.PushAway"})
    assert type(build_defense(config, tiny_model(), seed=1)).__name__ == "PushAway"


def test_a_chain_trains_again_when_its_source_changes(here):
    job = Job("a", "train", "a", None, (), here / "jobs" / "a", {"safety_defense": "push_away.PushAway"}, ())
    before = fingerprint(job, [])
    assert fingerprint(job, []) == before
    (here / "push_away.py").write_text(CODE + "# changed\n")
    assert fingerprint(job, []) != before
