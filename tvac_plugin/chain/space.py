"""Open settings, ranges and choices in the place of values, and the blocks of a chain that have them found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from tvac_plugin.boundary.errors import UserError, explain
from tvac_plugin.configs.base import Block

Arm = Mapping[str, Any]
_DIGITS = 3


class Range(Block):
    """Numbers from `low` to `high`; whole ones if both are."""

    block: ClassVar[str] = "range"

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _refuse_empty(self) -> Range:
        if not self.low < self.high:
            raise UserError(f"`low: {self.low}` is not below `high: {self.high}`. Exchange them, or give one value.")
        if self.log and self.low <= 0:
            raise UserError(f"`low: {self.low}` has no logarithm. Take one above 0, or leave `log:` out.")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether it has whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def holds(self, value: Any) -> bool:
        """Whether `value` is in it."""
        is_number = isinstance(value, int if self.is_whole else int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high

    def suggest(self, trial: Any, key: str) -> int | float:
        """What an Optuna trial takes for `key`; three digits, for folders are named after it."""
        if self.is_whole:
            whole: int = trial.suggest_int(key, self.low, self.high, log=self.log)
            return whole
        rounded = float(f"{trial.suggest_float(key, self.low, self.high, log=self.log):.{_DIGITS}g}")
        return min(max(rounded, self.low), self.high)

    def ends(self) -> tuple[Any, Any]:
        """Values between which all others are."""
        return self.low, self.high


class Choice(Block):
    """One of several values."""

    block: ClassVar[str] = "choice"

    one_of: list[Any] = Field(min_length=2)

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of them."""
        return any(type(value) is type(option) and value == option for option in self.one_of)

    def suggest(self, trial: Any, key: str) -> Any:
        """What an Optuna trial takes for `key`."""
        return self.one_of[trial.suggest_categorical(key, list(range(len(self.one_of))))]

    def ends(self) -> tuple[Any, Any]:
        """The first and the last."""
        return self.one_of[0], self.one_of[-1]


_SEED = Field(
    default=None, ge=0,
    description="Of the sampler, and in place of the matrix's seeds. Default: 0, and the first of the matrix.",
)  # fmt: skip


class Search(Block):
    """How the open settings of arms are found."""

    block: ClassVar[str] = "search"

    trials: int = Field(ge=2, le=10_000, description="Settings that are tried for each arm that has open ones.")
    judge: str = Field(
        description="The evaluation stage that decides. It must ask other questions than the rest; the chain itself "
        "leaves it out."
    )
    seed: int | None = _SEED
    keep: dict[str, Annotated[float, Field(gt=0, le=100)]] = Field(
        default_factory=dict,
        description="What an aligned model must keep, as `{benign: 90}`: percent of what the undefended one has in "
        "that measure. A trial that keeps less is the worst. Default: nothing.",
    )  # fmt: skip


class Attacker(Block):
    """A user who means harm, tries settings against every arm, and keeps the most harmful model that is of use."""

    block: ClassVar[str] = "attacker"

    trials: int = Field(ge=2, le=10_000, description="Settings that are tried against each arm.")
    settings: dict[str, Any] = Field(
        min_length=1,
        description="What the attacker chooses: keys of attacks as in `matrix:`, each with a range or a choice, such "
        "as `attack.learning_rate: {low: 1.0e-6, high: 1.0e-3, log: true}`.",
    )
    judge: str = Field(description="The evaluation stage that tells the attacker how far a trial came.")
    seed: int | None = _SEED
    min_retention: dict[str, Annotated[float, Field(gt=0, le=100)]] = Field(
        default_factory=dict,
        description="What the attacked model must keep to be of use, as `{benign: 80}`: percent of what the model that "
        "the attack starts from has in that measure. Default: nothing.",
    )
    min_task: dict[str, Annotated[float, Field(gt=0, le=100)]] = Field(
        default_factory=dict,
        description="What the attacked model must reach for a user who wants a task too, as `{task: 60}`: accuracy in "
        "percent. Default: nothing.",
    )

    def spaces(self) -> dict[str, Range | Choice]:
        """The open settings by their keys.

        Raises:
            UserError: One of them is not open, or makes no sense.
        """
        found = open_settings(self.settings, where="attacker.settings")
        for key in self.settings.keys() - found.keys():
            raise UserError(
                f"attacker.settings: `{key}` is one value, and nothing to choose from. Write `{{low: , high: }}` or "
                "`{one_of: []}`, or set it in the attack's recipe."
            )
        return found


def looks_open(value: Any) -> bool:
    """Whether a value is written like a range or a choice."""
    return isinstance(value, Mapping) and ("one_of" in value or {"low", "high"} <= value.keys())


def open_settings(arm: Arm, *, where: str = "arms") -> dict[str, Range | Choice]:
    """The keys of an arm whose value is a range or a choice; `where` it stands in the recipe is for errors.

    Raises:
        UserError: It makes no sense; names the key.
    """
    found: dict[str, Range | Choice] = {}
    for key, value in arm.items():
        if looks_open(value):
            kind = Choice if "one_of" in value else Range
            try:
                found[key] = kind.model_validate(dict(value))
            except ValidationError as error:
                raise UserError(f"{where}: `{key}`: {' '.join(explain(error))}") from error
    return found


def closed(arm: Arm, values: Mapping[str, Any]) -> dict[str, Any]:
    """The arm with its open settings decided."""
    return {**arm, **values}
