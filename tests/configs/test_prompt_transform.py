"""The ways in which a user rewrites harmful prompts."""

from __future__ import annotations

import pytest

from tvac_plugin.configs.prompt_transform import TRANSFORMS, PromptTransform
from tvac_plugin.configs.simulated_user import SimulatedUserConfig

ENTRY = [{"path": "x"}]


def user(transform):
    return SimulatedUserConfig(harmful_ratio=1.0, harmful_datasets=ENTRY, prompt_transform=transform).prompt_transform


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_name_stands_for_its_row_of_the_table_and_changes_what_is_asked(name):
    assert user(name) == TRANSFORMS[name]
    assert user(name).asked("how ?").startswith("how ?")
    assert len(user(name).asked("how ?")) > len("how ?")
    assert user(name).answered("so").endswith("so")


def test_one_of_one_s_own_is_a_mapping_and_what_it_leaves_out_stays():
    own = user({"prompt": "Please, {prompt}"})
    assert (own.asked("{answer}"), own.answered("so")) == ("Please, {answer}", "so")
    assert user(None) is None


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ("bakdoor", "`bakdoor` is not one. Did you mean `backdoor`?"),
        ({"prompt": "no mark"}, "prompt_transform.prompt: write `{prompt}` in it once"),
        ({"prompt": "{prompt} {prompt}"}, "prompt_transform.prompt: write `{prompt}` in it once"),
        ({"answer": ""}, "prompt_transform.answer: write `{answer}` in it once"),
        ({"promt": "{prompt}"}, "unknown key `promt`. Did you mean `prompt`?"),
    ],
)
def test_what_would_lose_the_row_is_refused(transform, message):
    with pytest.raises(ValueError, match="prompt_transform") as refusal:
        user(transform)
    assert message in str(refusal.value)


def test_a_transform_loses_nothing_in_a_recipe():
    assert PromptTransform.model_validate(TRANSFORMS["style"].model_dump()) == TRANSFORMS["style"]
