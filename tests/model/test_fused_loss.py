"""The loss taken a few tokens at a time is the loss of all, with its gradients, and keeps no logits."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import FAMILIES, random_batch, tiny_model, with_lora
from tvac_plugin.model import fused_loss
from tvac_plugin.model.answer_head import answers_only, find_answer_head

PROCESSED = ("cohere", "gemma2", "granite")
"""Families that scale or cap their logits before the loss."""


@pytest.fixture(autouse=True)
def pieces_of_three_tokens(monkeypatch):
    monkeypatch.setattr(fused_loss, "TOKENS_AT_A_TIME", 3)


def frozen_head(family="llama"):
    model = with_lora(tiny_model(family))
    return model, find_answer_head(model)


def step(model, inputs, **kwargs):
    model.zero_grad()
    outputs = model(**inputs, **kwargs)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_items", [None, 31, torch.tensor(31)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_loss_logits_and_gradients_are_those_of_all_tokens_at_once(family, num_items):
    (model, head), batch = frozen_head(family), random_batch(rows=4, prompt=3)
    assert head.can_fuse
    with answers_only(head._replace(model=None), batch) as inputs:
        expected, expected_gradients = step(model, inputs, num_items_in_batch=num_items)
    with answers_only(head, batch) as inputs:
        found, gradients = step(model, inputs, num_items_in_batch=num_items)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_under_bf16_autocast_the_gradients_are_as_close_to_float32s_as_without():
    (model, head), batch = frozen_head(), random_batch(rows=4, prompt=3)
    with answers_only(head, batch) as inputs:
        _, precise = step(model, inputs)
    distances = []
    for way in (head._replace(model=None), head):
        with torch.autocast("cpu", torch.bfloat16), answers_only(way, batch) as inputs:
            _, found = step(model, inputs)
        distances.append(torch.cat([(found[name] - precise[name]).flatten() for name in precise]).norm())
    assert 0 < distances[1] <= 1.1 * distances[0]


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.answers_only])
def test_every_family_has_the_loss_and_gradients_of_the_whole_sequence(family):
    model, batch = tiny_model(family), random_batch(rows=4, prompt=3)
    model.get_output_embeddings().requires_grad_(False)
    expected, expected_gradients = step(model, batch)
    with answers_only(find_answer_head(model), batch, logits=False) as inputs:
        found, gradients = step(model, inputs)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("logits", [True, False])
def test_no_graph_keeps_the_logits_of_more_tokens_than_a_piece(logits):
    (model, head), batch = frozen_head(), random_batch(rows=4, prompt=3)
    sizes = []
    recorded = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t)
    with answers_only(head, batch, logits=logits) as inputs, recorded:
        found = model(**inputs)
    vocabulary = model.config.vocab_size
    kept = [size for size in sizes if len(size) > 1 and size[-1] == vocabulary and size[0] != model.config.hidden_size]
    assert kept
    assert all(size[:-1].numel() <= 3 for size in kept)
    assert found.logits.shape == (1, inputs["shift_labels"].shape[1], vocabulary if logits else 0)
    assert not found.logits.requires_grad


def test_a_batch_without_any_answer_gives_what_the_whole_sequence_gives():
    (model, head), batch = frozen_head(), random_batch()
    batch["labels"][:] = -100
    with answers_only(head, batch) as inputs:
        assert model(**inputs).loss.isnan()
        assert model(**inputs, num_items_in_batch=3).loss == 0


def test_without_gradients_the_logits_are_all_there():
    (model, head), batch = frozen_head(), random_batch()
    with torch.no_grad(), answers_only(head, batch, logits=False) as inputs:
        outputs = model(**inputs)
    assert outputs.logits.shape[-1] == model.config.vocab_size
    torch.testing.assert_close(outputs.loss, model(**batch).loss, rtol=1e-6, atol=0)


def test_in_fp16_which_needs_the_loss_scale_all_logits_are_there():
    (model, head), batch = frozen_head(), random_batch()
    with torch.autocast("cpu", torch.float16), answers_only(head, batch, logits=False) as inputs:
        outputs = model(**inputs)
    assert outputs.logits.requires_grad
    assert outputs.logits.shape[-1] == model.config.vocab_size


def test_a_head_that_learns_is_not_fused():
    model = tiny_model()
    assert not find_answer_head(model).can_fuse
    assert find_answer_head(model.requires_grad_(False)).can_fuse


@pytest.mark.parametrize("family", PROCESSED)
def test_logits_that_are_scaled_or_capped_before_the_loss_are_not_fused(family):
    _, head = frozen_head(family)
    assert head is not None
    assert not head.can_fuse


def test_a_loss_of_its_own_is_not_fused():
    model = with_lora(tiny_model())
    model.get_base_model().loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    assert not find_answer_head(model).can_fuse


def test_head_and_loss_are_as_before_afterwards_also_after_an_error():
    (model, head), batch = frozen_head(), random_batch()
    base = model.get_base_model()
    with pytest.raises(ValueError, match="exactly one"), answers_only(head, batch):
        model(input_ids=None)
    assert "forward" not in vars(head.module)
    assert "_loss_function" not in vars(base)
    assert not head.module._forward_pre_hooks
    assert not head.module._forward_hooks
