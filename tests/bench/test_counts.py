from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from tests.support.models import random_batch, tiny_model, with_lora
from tvac_plugin.bench.counts import SavedActivations, count_step, counted_passes
from tvac_plugin.model.architecture import find_blocks

FLOAT = 4


def leaf(*sizes):
    return torch.ones(*sizes, requires_grad=True)


def peak(step, model=None):
    saved = SavedActivations(model or nn.Module())
    with saved.recorded():
        step()
    return saved


def test_a_storage_saved_twice_counts_once():
    def step():
        y = leaf(3, 5).exp()  # saves y
        (y * y).sum().backward()  # saves y twice more

    assert peak(step).peak_bytes == 3 * 5 * FLOAT


def test_a_view_counts_as_the_whole_storage_it_keeps():
    def step():
        base = torch.ones(10, 5)
        (leaf(5) * base[0]).sum().backward()

    assert peak(step).peak_bytes == 10 * 5 * FLOAT


def test_parameters_and_buffers_are_left_out():
    layer = nn.Linear(6, 2, bias=False)
    layer.register_buffer("scale", torch.ones(2))
    x = torch.ones(7, 6)
    assert peak(lambda: (layer(x) * layer.scale).sum().backward(), layer).peak_bytes == 7 * 6 * FLOAT


def test_graphs_count_together_only_while_both_are_alive():
    def one_after_the_other():
        for _ in range(2):
            leaf(8).exp().sum().backward()

    def at_once():
        graphs = [leaf(8).exp().sum() for _ in range(2)]
        for graph in graphs:
            graph.backward()

    assert peak(one_after_the_other).peak_bytes == 8 * FLOAT
    assert peak(at_once).peak_bytes == 2 * 8 * FLOAT


def test_nothing_is_held_after_backward():
    saved = peak(lambda: leaf(8).exp().sum().backward())
    gc.collect()
    assert saved.bytes_now == 0


def test_flops_are_those_of_the_products():
    model = tiny_model(num_hidden_layers=1)
    a, b = leaf(3, 5), torch.ones(5, 7)
    counts = count_step(model, lambda: (a @ b).sum().backward())
    assert counts.flops == 2 * (2 * 3 * 5 * 7), "forward, and the gradient of a"
    assert (counts.layer_forwards, counts.layer_backwards) == (0, 0)


def test_plain_training_runs_and_differentiates_every_layer_once():
    model = with_lora(tiny_model())
    counts = count_step(model, lambda: model(**random_batch()).loss.backward())
    assert (counts.layer_forwards, counts.layer_backwards) == (4, 4)


def test_layers_without_anything_to_learn_below_them_are_run_but_not_differentiated():
    model = tiny_model()
    for block in find_blocks(model)[:3]:
        block.layer.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    counts = count_step(model, lambda: model(**random_batch()).loss.backward())
    assert (counts.layer_forwards, counts.layer_backwards) == (4, 1)


def test_a_pass_without_autograd_counts_as_forward_alone():
    model = tiny_model()
    with torch.no_grad():
        counts = count_step(model, lambda: model(**random_batch()))
    assert (counts.layer_forwards, counts.layer_backwards, counts.saved_bytes) == (4, 0, 0)


def test_a_recomputed_layer_counts_as_run_again():
    model = with_lora(tiny_model())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    counts = count_step(model, lambda: model(**random_batch()).loss.backward())
    assert (counts.layer_forwards, counts.layer_backwards) == (8, 4)


def test_hooks_come_off_when_the_step_raises():
    model = tiny_model()
    with pytest.raises(RuntimeError, match="lost"), counted_passes(model):
        raise RuntimeError("lost")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
