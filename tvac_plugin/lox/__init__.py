"""LoX, low-rank extrapolation (arXiv 2506.15606): a stage after alignment that changes weights without training.

`apply_lox` turns a folder with an aligned model or adapter into one with the extrapolated weights; `extrapolate` and
`extrapolate_factors` are its step on one weight.
"""

from __future__ import annotations

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.lox.apply import apply_lox
from tvac_plugin.lox.extrapolation import extrapolate, extrapolate_factors

__all__ = ["UserError", "apply_lox", "extrapolate", "extrapolate_factors"]
