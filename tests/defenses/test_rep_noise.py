"""RepNoise against arXiv 2405.14577, equation 4, written out."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.models import precise_gpt2, random_batch, random_pair, tiny_model
from tests.support.straight_line import PlainGPT2, gradient
from tvac_plugin.configs.unlearning import RepNoiseConfig
from tvac_plugin.defenses import RepNoise
from tvac_plugin.defenses.base import Position
from tvac_plugin.defenses.rep_noise import masked_cross_entropy, mmd
from tvac_plugin.defenses.testing import PlainHost

FIRST = Position(step=0, starts_step=True)


def step(model, *, pair=None, position=FIRST, **settings):
    host = PlainHost(model, streams={"pairs": [pair or random_pair()]})
    return RepNoise(RepNoiseConfig(**settings), model, seed=1).step(host, random_batch(), position)


def mmd_by_loops(x, y):
    """Mean of k(x, x') + k(y, y') - k(x, y') - k(y, x'), k a sum of five Gaussians, element by element."""
    rows = [*x, *y]
    distance = [[(a - b).pow(2).sum() for b in rows] for a in rows]
    mean = sum(d.item() for line in distance for d in line) / (len(rows) * (len(rows) - 1))
    k = [[sum(torch.exp(-d / (mean / 4 * 2**i)) for i in range(5)) for d in line] for line in distance]
    n = len(x)
    return sum(k[i][j] + k[n + i][n + j] - k[i][n + j] - k[n + i][j] for i in range(n) for j in range(n)) / n**2


def masked_loss(logits, batch, differ):
    """Mean of -log p over the answer tokens at which the two answers differ, one by one."""
    tokens = [
        -logits[row, t - 1].log_softmax(-1)[batch["labels"][row, t]]
        for row in range(len(logits))
        for t in range(1, logits.shape[1])
        if differ[row, t] and batch["labels"][row, t] != -100
    ]
    return torch.stack(tokens).mean()


def test_one_step_equals_the_paper(monkeypatch):
    # grad [ L(w; B) + CE_m(x_s) + beta * N - alpha * log(1 + A) ]
    noise, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: noise.append(randn(*a, **k)) or noise[-1])
    model, (harmful, refusal) = precise_gpt2(), random_pair()
    plain = PlainGPT2(model, num_layers=4, num_heads=2)
    report = step(model, alpha=0.7, beta=0.5, refusal_scale=0.9)
    assert len(noise) == 4

    w = plain.weights
    differ = harmful["input_ids"] != refusal["input_ids"]
    assert not differ[:, :3].any(), "the prompt is shared"
    assert not differ[:, 4].any(), "so is one token of the answers"
    logits, depths, feed_forwards = plain.forward(w, harmful["input_ids"])
    kept = (differ & (harmful["labels"] != -100)).unsqueeze(-1)
    n = (
        sum(
            mmd_by_loops((f * kept).flatten(1), (z * kept).flatten(1))
            for f, z in zip(feed_forwards, noise, strict=True)
        )
        / 4
    )
    lens = [masked_loss(plain.head(w, h), harmful, differ) for h in depths[:-1]]
    a = (sum(lens) + masked_loss(logits, harmful, differ)) / 5
    s = masked_loss(plain.forward(w, refusal["input_ids"])[0], refusal, differ)
    total = plain.loss(w, random_batch()) + 0.9 * s + 0.5 * n - 0.7 * (1 + a).log()
    expected = gradient(total, w)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-12, msg=name)
    assert report.losses["noise_loss"].item() == pytest.approx(n.item(), rel=1e-8)
    assert report.losses["harmful_loss"].item() == pytest.approx(a.item(), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_ids_survive_every_precision(dtype):
    # 29871 and 50000 are not bfloat16 numbers; rounded labels would be 29824 and 49920
    labels = torch.tensor([[-100, 29871, 50000]])
    batch = {"labels": labels}
    logits = torch.zeros(1, 3, 50001, dtype=dtype)
    logits[0, 0, 29871] = logits[0, 1, 50000] = 50.0
    assert masked_cross_entropy(logits, batch, labels != -100).item() == pytest.approx(0.0, abs=1e-6)


def test_token_zero_counts_like_any_other():
    batch = {"labels": torch.tensor([[-100, 0, 5]])}
    loss = masked_cross_entropy(torch.zeros(1, 3, 8), batch, batch["labels"] != -100)
    wrong = torch.zeros(1, 3, 8)
    wrong[0, 0, 3] = 10.0
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)
    assert masked_cross_entropy(wrong, batch, batch["labels"] != -100) > loss + 3.9


def test_mmd_is_zero_for_equal_samples_and_grows_with_their_distance():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert mmd(x, x.clone()).item() == pytest.approx(0.0, abs=1e-12)
    assert mmd(x, x + 5) > mmd(x, x + 1) > 0
    torch.testing.assert_close(mmd(x, 2 * x + 1), mmd_by_loops(x, 2 * x + 1), rtol=1e-9, atol=0)


def test_what_both_answers_share_is_left_alone():
    # changing a shared answer token changes prompts for later ones, but is no target itself
    batch = {"labels": torch.tensor([[-100, 4, 5]])}
    differ = torch.tensor([[False, False, True]])
    logits = torch.zeros(1, 3, 8)
    logits[0, 0, 7] = 30.0
    assert masked_cross_entropy(logits, batch, differ).item() == pytest.approx(math.log(8), rel=1e-6)


def test_answers_that_nowhere_differ_give_no_loss_instead_of_nan():
    batch = {"labels": torch.tensor([[-100, 4, 5]])}
    assert masked_cross_entropy(torch.randn(1, 3, 8), batch, torch.zeros(1, 3, dtype=torch.bool)).item() == 0.0


def test_no_hook_is_left_behind():
    model, counts = tiny_model("gpt2"), []
    for _ in range(3):
        step(model)
        counts.append(sum(len(module._forward_hooks) for module in model.modules()))
    assert counts[0] == counts[2], "transformers' own recorders stay, once"
    assert not any(block.mlp._forward_hooks for block in model.transformer.h)


def test_zero_scales_equal_sft():
    reference, model = precise_gpt2(), precise_gpt2()
    PlainHost(reference).train(random_batch())
    step(model, alpha=0.0, beta=0.0, refusal_scale=0.0)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        step(model, beta=1.0)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_models_without_feed_forward_modules_are_refused():
    with pytest.raises(ValueError, match="rep_noise needs feed-forward modules, and OPTDecoderLayer has none"):
        RepNoise(RepNoiseConfig(), tiny_model("opt"), seed=1)


def test_any_seed_of_a_recipe_seeds_the_noise():
    model = tiny_model("gpt2")
    host = PlainHost(model, {"pairs": [random_pair()]})
    for seed in (0, 1_844_700_000, 2**31 - 1):
        report = RepNoise(RepNoiseConfig(), model, seed=seed).step(host, random_batch(), FIRST)
        assert report.losses["noise_loss"].isfinite()
