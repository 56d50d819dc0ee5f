"""The trainer's side of the seam, where it can be held without a trainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tvac_plugin.trainers.host import TrainerHost


def host(scaler):
    accelerator = SimpleNamespace(scaler=scaler, num_processes=1)
    return TrainerHost(
        SimpleNamespace(streams={}, accelerator=accelerator, args=SimpleNamespace(device="cpu")), None, None
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_added_gradients_are_on_the_scale_that_the_optimizer_takes_off(scaled):
    # a step of which nothing went through the trainer's own backward, as Lisa's on alignment data
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    weight, seam = nn.Parameter(torch.tensor([3.0])), host(scaler)
    seam.add_gradients([weight], seam.gradients((weight**2).sum(), [weight]))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    if scaler is not None:
        scaler.unscale_(optimizer)
    assert weight.grad.item() == 6.0


@pytest.mark.parametrize(("scaled", "expected"), [(False, 0.0), (True, 1e-8)])
def test_gradients_at_fp16_outputs_go_through_the_loss_scale(scaled, expected):
    # the smallest number of fp16 is 6e-8: without the scale such a gradient is lost, and with it the perturbation
    seam = host(torch.amp.GradScaler("cpu", init_scale=65536.0) if scaled else None)
    output = torch.ones(3, dtype=torch.float16, requires_grad=True)
    (gradient,) = seam.output_gradients((output.float() * 1e-8).sum(), [output])
    torch.testing.assert_close(gradient.float(), torch.full((3,), expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("dtype", "is_lost"), [(torch.bfloat16, True), (torch.float32, False)])
def test_what_is_added_is_lost_where_it_is_below_the_precision_of_the_gradients(scaled, dtype, is_lost):
    seam = host(torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None)
    weight = nn.Parameter(torch.ones(2, dtype=dtype))
    assert seam.lost() is None
    seam.add_gradients([weight], [torch.full((2,), 1e-3, dtype=dtype)])
    assert not seam.lost()
    weight.grad += 1024.0 if scaled else 1.0  # what training adds
    assert seam.lost() == is_lost
