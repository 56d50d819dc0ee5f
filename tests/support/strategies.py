"""What people, and their editors, put into YAML: sense, near sense and nonsense, for every block of ours."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from tvac_plugin.configs import DEFENSE_CONFIGS
from tvac_plugin.configs.base import DATA_KEYS

ENTRIES = [{"path": "rows.jsonl", "type": "alpaca"}]


def fuzz(examples: int) -> settings:
    """The same examples on every machine."""
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None)


numbers = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([10**9, 10**400, -(10**400), 2**63, True, False]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 8.0, 1e-320, 1e309, -1e309, float("nan"), 1e308]),
)
texts = st.one_of(
    st.sampled_from(["3", "1e-4", "1_000", "nan", ".inf", "", " ", "on", "8.0", "٣", "é" * 3, "\x00", "x" * 5000]),
    st.sampled_from(["\u202e", "null", "~", "{{ x }}", "${HOME}", "../..", "none", "layer", "attention", "batch"]),
    st.text(max_size=8),
)
keys = st.one_of(texts, st.integers(-1, 2), st.none(), st.booleans(), st.sampled_from(["rho", "Rho", "path", "seed"]))
values = st.recursive(
    st.one_of(st.none(), numbers, texts, st.binary(max_size=3), st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=4,
)
plausible = st.one_of(st.integers(1, 8), st.sampled_from([0.5, 1.0, 2.0]), values)


def blocks(names):
    """Blocks with some of the right keys, and sometimes a wrong one."""
    right = st.dictionaries(st.sampled_from(sorted(names)), plausible, min_size=1, max_size=3)
    wrong = st.dictionaries(keys, values, max_size=1)
    return st.builds(lambda first, second: {**second, **first}, right, st.one_of(st.just({}), st.just({}), wrong))


@st.composite
def defenses(draw):
    """A recipe that asks for a defense and sets some of its keys."""
    name = draw(st.sampled_from(sorted(DEFENSE_CONFIGS)))
    recipe = {"safety_defense": name, **dict.fromkeys(DATA_KEYS, ENTRIES)}
    recipe[name] = draw(blocks(DEFENSE_CONFIGS[name].model_fields))
    return recipe


def recipes(names):
    """Whole recipes with anything under our keys."""
    return st.dictionaries(st.sampled_from(sorted(names)), st.one_of(values, st.just(ENTRIES), st.just({})), max_size=4)
