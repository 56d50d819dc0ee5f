"""The head and the loss on answer tokens alone give the loss and the gradients of the whole sequence."""

from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from tests.support.models import FAMILIES, random_batch, tiny_model, with_lora
from tvac_plugin.model.answer_head import answers_only, find_answer_head


def ragged_batch():
    """Answers of different places and lengths, and a row without any."""
    batch = random_batch(rows=4, prompt=3)
    batch["labels"][0, 6:] = -100
    batch["labels"][1, 4] = -100
    batch["labels"][2] = -100
    return batch


def gradients(model, batch, **kwargs):
    torch.manual_seed(0)  # of dropout (XGLM)
    model.zero_grad()
    loss = model(**batch, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_items", [None, torch.tensor(31)])
def test_loss_and_gradients_are_those_of_the_whole_sequence(family, num_items):
    model, batch = tiny_model(family), ragged_batch()
    head = find_answer_head(model)
    if head is None:
        assert not FAMILIES[family].answers_only
        pytest.skip("in transformers 5.16 it does not take `shift_labels`")
    expected_loss, expected = gradients(model, batch, num_items_in_batch=num_items)
    with answers_only(head, batch) as inputs:
        loss, found = gradients(model, inputs, num_items_in_batch=num_items)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_model_that_does_not_take_shifted_labels_is_told():
    model = tiny_model()
    model.loss_function = lambda logits, labels, vocab_size, **_: ForCausalLMLoss(logits, labels, vocab_size)
    assert find_answer_head(model) is None


def test_the_head_sees_answer_tokens_alone_and_only_inside():
    model, batch = with_lora(tiny_model()), ragged_batch()
    with answers_only(find_answer_head(model), batch) as inputs:
        logits = model(**inputs).logits
    num_answers = int((batch["labels"][:, 1:] != -100).sum())
    assert logits.shape[:2] == inputs["shift_labels"].shape == (1, num_answers)
    assert model(**batch).logits.shape[:2] == batch["labels"].shape
    assert "shift_labels" not in batch


def test_a_batch_without_any_answer_gives_what_the_whole_sequence_gives():
    model, batch = tiny_model(), random_batch()
    batch["labels"][:] = -100
    with answers_only(find_answer_head(model), batch) as inputs:
        assert model(**inputs).loss.isnan()
        assert model(**inputs, num_items_in_batch=3).loss == 0


@pytest.mark.parametrize("reason", ["the head is never called", "the labels are read as they are", "no head"])
def test_models_with_another_way_to_their_loss_are_left_alone(reason):
    model = tiny_model()
    forward = model.forward
    if reason == "the head is never called":
        model.forward = lambda shift_labels=None, **batch: forward(**batch)
        head = model.lm_head
        model.lm_head = torch.nn.Identity()
        model.get_output_embeddings = lambda: head
    elif reason == "the labels are read as they are":
        model.forward = lambda shift_labels=None, **batch: forward(**batch)
    else:
        model.get_output_embeddings = lambda: None
    assert find_answer_head(model) is None


def test_the_trial_leaves_the_model_as_it_was():
    model = tiny_model(attention_dropout=0.5)
    random_state = torch.get_rng_state()
    assert find_answer_head(model) is not None
    assert model.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert not model.lm_head._forward_pre_hooks
