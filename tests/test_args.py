"""The schema: bounds, defaults from the papers, and messages that say what to write."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tvac_plugin.args import SafetyDefenseArgs, defense_config
from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.configs.perturbation import TVaccineConfig, VaccineConfig

HARMFUL = [{"path": "harmful.jsonl", "type": "alpaca"}]


def validate(**recipe):
    return SafetyDefenseArgs.model_validate(recipe)


def test_defaults_are_the_papers():
    assert TVaccineConfig().model_dump() == {
        "rho": 3.0,
        "num_active_layers": 8,
        "layer_sampling": "gradient_norm",
        "resample_steps": 20,
        "probe_steps": 200,
        "probe_samples": 200,
        "probe_batch_size": 8,
        "freeze": "layer",
        "perturb": "attention",
        "rho_scope": "batch",
        "rho_scale": "absolute",
        "perturbed_share": 1.0,
        "checkpoint_inactive": "auto",
    }
    assert VaccineConfig().model_dump() == {
        "rho": 2.0,
        "perturb": "attention",
        "rho_scope": "batch",
        "rho_scale": "absolute",
        "perturbed_share": 1.0,
    }


@pytest.mark.parametrize("config", DEFENSE_CONFIGS.values())
def test_every_field_is_described_with_its_default(config):
    for name, field in config.model_fields.items():
        assert f"Default {str(field.default).removesuffix('.0')}" in field.description, name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rho", -1),
        ("rho", "3"),
        ("rho", float("nan")),
        ("rho", float("inf")),
        ("rho", True),
        ("num_active_layers", 0),
        ("num_active_layers", 2.5),
        ("num_active_layers", True),
        ("resample_steps", 0),
        ("probe_steps", 10**9),
        ("probe_samples", 0),
        ("layer_sampling", "random"),
        ("freeze", True),
        ("perturb", None),
        ("rho_scope", "token"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(key, value):
    with pytest.raises(ValidationError) as caught:
        validate(safety_defense="t_vaccine", harmful_datasets=HARMFUL, t_vaccine={key: value})
    assert caught.value.errors()[0]["loc"][:2] == ("t_vaccine", key)


def test_whole_numbers_are_accepted_as_rho():
    assert TVaccineConfig.model_validate({"rho": 3}).rho == 3.0


def test_an_unknown_key_in_a_block_names_the_nearest():
    with pytest.raises(
        ValidationError, match=r"t_vaccine: unknown key `resample_step`. Did you mean `resample_steps`\?"
    ):
        validate(safety_defense="t_vaccine", harmful_datasets=HARMFUL, t_vaccine={"resample_step": 3})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("t-vaccine", "Did you mean `t_vaccine`"),
        ("tvaccine", "Did you mean `t_vaccine`"),
        ("T_Vaccine", "Did you mean `t_vaccine`"),
        ("shield", "Use one of: none, t_vaccine, vaccine, random_noise"),
        (True, "Use one of"),
    ],
)
def test_an_unknown_defense_names_the_nearest(value, message):
    with pytest.raises(ValidationError, match=f"`{value}` is not a defense. ?{message}"):
        validate(safety_defense=value)


def test_t_vaccine_without_harmful_data_shows_the_entry_to_add():
    with pytest.raises(ValidationError, match=r"needs harmful prompts.*Add `harmful_datasets: \[\{path: harmful.jsonl"):
        validate(safety_defense="t_vaccine")
    validate(safety_defense="vaccine")


def test_a_block_without_the_line_that_turns_it_on_is_refused():
    with pytest.raises(
        ValidationError, match="`t_vaccine:` is set but `safety_defense:` is not.*Add `safety_defense: t"
    ):
        validate(t_vaccine={})


def test_blocks_of_other_defenses_may_stay():
    args = validate(safety_defense="none", harmful_datasets=HARMFUL, t_vaccine={"rho": 1.0}, vaccine={})
    assert defense_config(args.model_dump()) is None


def test_the_selected_block_becomes_the_settings():
    recipe = {"safety_defense": "t_vaccine", "harmful_datasets": HARMFUL, "t_vaccine": {"rho": 1.5}}
    assert defense_config(validate(**recipe).model_dump()) == TVaccineConfig(rho=1.5)
    assert defense_config({"safety_defense": "vaccine"}) == VaccineConfig()
