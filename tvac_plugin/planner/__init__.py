"""What a recipe will cost, counted on fake tensors before a GPU is rented."""

from __future__ import annotations

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.planner.plan import RecipePlan, make_plan

__all__ = ["RecipePlan", "UserError", "make_plan"]
