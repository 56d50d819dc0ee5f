"""Trials: what is tried next for an arm, and the small chain in which it is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.chain.recipe import Chain, LoxConfig, applies
from tvac_plugin.chain.space import Arm, Choice, Range, closed
from tvac_plugin.configs import DEFENSE_CONFIGS

Cell = Mapping[str, Any]
_STARTUP = 4
"""Trials before the sampler learns from them; fixed, so that more trials add to those that are done."""


class Study:
    """The trials of one arm, by Optuna's TPE; the first is what the recipes say.

    Attributes:
        arm: As the recipe has it.
        values: Of the open settings, as they were asked last.
    """

    def __init__(
        self, chain: Chain, arm: Arm, spaces: Mapping[str, Range | Choice], *, seed: int | None, maximise: bool
    ) -> None:
        """Names what is open. The sampler is deterministic.

        Raises:
            UserError: Optuna is not installed.
        """
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                "`search:` and `attacker:` need Optuna. Install it with `pip install 'tvac-plugin[search]'`."
            ) from error
        self.arm, self.values = arm, dict[str, Any]()
        self._spaces = spaces
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed or 0, n_startup_trials=_STARTUP)
        self._study = optuna.create_study(sampler=sampler, direction="maximize" if maximise else "minimize")
        self._study.enqueue_trial(_own_settings(chain, spaces))

    def ask(self) -> dict[str, Any]:
        """The arm as its next trial has it."""
        self._asked = self._study.ask()
        self.values = {key: space.suggest(self._asked, key) for key, space in self._spaces.items()}
        return closed(self.arm, self.values)

    def tell(self, score: float | None) -> None:
        """Takes what the trial came to; `None` where it failed."""
        from optuna.trial import TrialState

        self._study.tell(self._asked, score, state=TrialState.FAIL if score is None else None)


def small_chain(chain: Chain, arms: Sequence[Arm], *, judge: str, seed: int | None) -> Chain:
    """The chain of a round of trials: these arms, one value of each key of the matrix, and the stage that decides."""
    stages = [stage for stage in chain.recipe.stages if stage.evaluate is None or stage.name == judge]
    matrix = {
        key: [seed if key == "seed" and seed is not None else values[0]]
        for key, values in chain.recipe.matrix.items()
        if any(applies(key, stage, chain.recipes[stage.name]) for stage in stages)
    }
    changes = {"search": None, "attacker": None, "arms": list(arms), "matrix": matrix, "stages": stages}
    return Chain(chain.recipe.model_copy(update=changes), chain.recipes)


def words(arm: Arm) -> str:
    """An arm in words."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in arm.items())


def _own_settings(chain: Chain, spaces: Mapping[str, Range | Choice]) -> dict[str, Any]:
    """What the recipes say, or else the defense's defaults, where the open values have it; as Optuna writes it."""
    found: dict[str, Any] = {}
    for key, space in spaces.items():
        for value in (_written(chain, key), _default(key)):
            if space.holds(value):
                found[key] = space.one_of.index(value) if isinstance(space, Choice) else value
                break
    return found


def _written(chain: Chain, key: str) -> Any:
    """What the recipe of the first stage that `key` changes has there, or `None`."""
    stage = next(stage for stage in chain.recipe.stages if applies(key, stage, chain.recipes[stage.name]))
    path = key.partition(".")[2].split(".") if "." in key else ["simulated_user", key]
    value: Any = chain.recipes[stage.name]
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _default(key: str) -> Any:
    """The default of a defense's setting, such as `align.vaccine.rho`, or of a `lox:` stage's; `None` elsewhere."""
    path = key.split(".")[1:]
    if not path:
        return None
    config = LoxConfig if len(path) == 1 else DEFENSE_CONFIGS.get(path[0])
    field = config.model_fields.get(path[-1]) if config else None
    return field.default if field else None
