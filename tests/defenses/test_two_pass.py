"""The perturbation of arXiv 2402.01109 and 2410.09760: eps_l = rho * g_l / ||g||."""

from __future__ import annotations

import pytest
import torch

from tvac_plugin.defenses.budget import worst_perturbation
from tvac_plugin.model.numerics import norm


def gradients(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {layer: torch.randn(3, 4, 5, generator=generator, dtype=dtype) for layer in (0, 2)}


def test_batch_scope_bounds_the_norm_over_all_layers_and_keeps_the_direction():
    g = gradients()
    eps = worst_perturbation(g, rho=2.5, rho_scope="batch")
    flat_g, flat_eps = (torch.cat([t[layer].flatten() for layer in (0, 2)]) for t in (g, eps))
    torch.testing.assert_close(flat_eps, 2.5 * flat_g / flat_g.norm(), rtol=1e-12, atol=0)
    assert norm(list(eps.values())).item() == pytest.approx(2.5, rel=1e-12)


def test_sample_scope_bounds_every_sample_alone():
    g = gradients()
    eps = worst_perturbation(g, rho=2.5, rho_scope="sample")
    for row in range(3):
        alone = worst_perturbation({k: v[row : row + 1] for k, v in g.items()}, rho=2.5, rho_scope="batch")
        for layer in g:
            torch.testing.assert_close(eps[layer][row : row + 1], alone[layer], rtol=1e-12, atol=0)


def test_a_sample_without_gradient_is_not_perturbed_and_does_not_spoil_the_others():
    g = gradients()
    for gradient in g.values():
        gradient[1] = 0
    eps = worst_perturbation(g, rho=1.0, rho_scope="sample")
    assert norm([v[1:2] for v in eps.values()]) == 0
    assert norm([v[0:1] for v in eps.values()]).item() == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_zero_or_non_finite_gradient_gives_no_perturbation(value):
    g = {0: torch.full((2, 3, 4), value)}
    assert torch.equal(worst_perturbation(g, rho=3.0, rho_scope="batch")[0], torch.zeros(2, 3, 4))


def test_the_norm_is_taken_in_float32_for_low_precision():
    g = {0: torch.full((64, 64, 64), 0.1, dtype=torch.bfloat16)}
    assert norm(list(worst_perturbation(g, rho=3.0, rho_scope="batch").values())).item() == pytest.approx(3.0, rel=1e-2)
