"""What a recipe will cost, counted on fake tensors before a GPU is rented."""

from __future__ import annotations

from tvac_plugin.planner.plan import Plan, make_plan
from tvac_plugin.planner.workload import PlanError

__all__ = ["Plan", "PlanError", "make_plan"]
