"""The open settings of an arm: ranges and choices, in the place of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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


def looks_open(value: Any) -> bool:
    """Whether a value is written like a range or a choice."""
    return isinstance(value, Mapping) and ("one_of" in value or {"low", "high"} <= value.keys())


def open_settings(arm: Arm) -> dict[str, Range | Choice]:
    """The keys of an arm whose value is a range or a choice.

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
                raise UserError(f"arms: `{key}`: {' '.join(explain(error))}") from error
    return found


def closed(arm: Arm, values: Mapping[str, Any]) -> dict[str, Any]:
    """The arm with its open settings decided."""
    return {**arm, **values}
