"""The defense in `trl.SFTTrainer`, without Axolotl."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model, with_lora
from tests.support.straight_line import PlainLlama
from tvac_plugin import SafetyDefenseSFTTrainer, TVaccineConfig, VaccineConfig
from tvac_plugin.provenance.manifest import verify
from tvac_plugin.tiny_world.base_model import build_tokenizer
from tvac_plugin.tiny_world.language import REFUSAL, World

WORLD = World.create(seed=0, num_hazards=20, num_benign=4)


def rows(things, *, refuse):
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": t.question}],
                "completion": [{"role": "assistant", "content": REFUSAL if refuse else t.answer}],
            }
            for t in things
        ]
    )


def config(output, **changes):
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "loss_type": "nll",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return SFTConfig(str(output), **settings | changes)


def trainer(output, *, cls=SafetyDefenseSFTTrainer, defense=None, harmful=True, dropout=0.0, **changes):
    tokenizer = build_tokenizer(WORLD)
    model = with_lora(tiny_model(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1), dropout=dropout)
    extra = {}
    if defense is not None:
        extra["defense"] = defense
        extra["harmful_dataset"] = rows(WORLD.hazards[10:], refuse=False) if harmful else None
    return cls(
        model=model,
        args=config(output, **changes),
        train_dataset=rows(WORLD.hazards[:10], refuse=True),
        processing_class=tokenizer,
        **extra,
    )


def trained(output, **options):
    run = trainer(output, **options)
    run.train()
    return run


def weights(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def assert_equal_weights(first, second):
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(second)[name]), name


def test_without_a_defense_it_is_exactly_sft(tmp_path):
    plain, ours = (trained(tmp_path / c.__name__, cls=c, dropout=0.3) for c in (SFTTrainer, SafetyDefenseSFTTrainer))
    assert_equal_weights(plain, ours)
    assert not (tmp_path / "SafetyDefenseSFTTrainer" / "safety_trace.jsonl").exists()


def test_one_optimizer_step_is_the_paper_s_gradient(tmp_path):
    # SGD with learning rate 1 and no clipping: the weights move by minus the gradient of L(w; e + eps)
    ours = trainer(
        tmp_path, defense=TVaccineConfig(rho=0.5, num_active_layers=2), max_steps=1, optim="sgd", learning_rate=1.0,
        max_grad_norm=0.0,
    )  # fmt: skip
    paper = PlainLlama(ours.model, num_layers=4, num_heads=2, lora_scale=2.0)
    batches, before = [], weights(ours)
    host_step = ours.host_step
    ours.host_step = lambda model, batch, num: batches.append(batch) or host_step(model, batch, num)
    ours.train()
    drawn = list(ours._defense._active)
    g = paper.activation_gradients(batches[0], drawn)
    norm = sum(x.square().sum() for x in g.values()).sqrt()
    paper.loss(batches[0], {layer: 0.5 * x / norm for layer, x in g.items()}).backward()
    for name, weight in weights(ours).items():
        gradient = paper.adapters[name.removeprefix("base_model.model.")].grad
        is_drawn = int(name.split("layers.")[1].split(".")[0]) in drawn
        expected = gradient if is_drawn else torch.zeros_like(weight)
        torch.testing.assert_close(before[name] - weight, expected, rtol=1e-4, atol=1e-5)


def test_rho_zero_with_every_layer_trains_as_sft(tmp_path):
    plain = trained(tmp_path / "plain", cls=SFTTrainer, dropout=0.3)
    ours = trained(tmp_path / "ours", defense=TVaccineConfig(rho=0.0, num_active_layers=4), dropout=0.3)
    assert_equal_weights(plain, ours)
    assert all((weights(ours)[n] != w).any() for n, w in weights(trainer(tmp_path / "new")).items())


@pytest.mark.parametrize(("schedule", "learning_rate", "settled"), [("cosine", 1e-2, True), ("constant", 5e-3, False)])
def test_a_run_says_whether_its_losses_had_settled(tmp_path, caplog, schedule, learning_rate, settled):
    run = trained(
        tmp_path, defense=VaccineConfig(rho=0.01), max_steps=40, learning_rate=learning_rate,
        lr_scheduler_type=schedule,
    )  # fmt: skip
    run.save_model()
    manifest = verify(tmp_path)
    assert manifest["settled"] is settled
    assert set(manifest["end_losses"]) == {"clean_loss", "perturbed_loss"}
    assert ("training ended before its losses had settled" in caplog.text) is not settled


def test_all_layers_without_freezing_trains_as_vaccine(tmp_path):
    runs = [
        trained(tmp_path / d.block, defense=d, dropout=0.3)
        for d in (VaccineConfig(rho=2.0), TVaccineConfig(rho=2.0, num_active_layers=4, freeze="none"))
    ]
    assert_equal_weights(*runs)


def test_checkpointing_changes_no_weight(tmp_path):
    defense = TVaccineConfig(rho=1.0, num_active_layers=2)
    runs = [
        trained(tmp_path / str(on), defense=defense, dropout=0.3, gradient_checkpointing=on,
                gradient_checkpointing_kwargs={"use_reentrant": False})
        for on in (False, True)
    ]  # fmt: skip
    assert_equal_weights(*runs)


def test_metrics_scale_with_the_loss_under_accumulation(tmp_path):
    ours = trainer(tmp_path, defense=TVaccineConfig(rho=0.0, num_active_layers=4), gradient_accumulation_steps=2)
    ours.train()
    for log in ours.state.log_history[:3]:
        assert log["safety/clean_loss"] == pytest.approx(log["safety/perturbed_loss"], rel=1e-4)
        assert log["safety/perturbed_loss"] == pytest.approx(log["loss"], rel=1e-3)


def test_host_metrics_count_every_token_once(tmp_path):
    counts = []
    for name, cls, defense in (
        ("p", SFTTrainer, None),
        ("o", SafetyDefenseSFTTrainer, TVaccineConfig(num_active_layers=2)),
    ):
        run = trainer(tmp_path / name, cls=cls, defense=defense)
        run.train()
        counts.append([log["num_tokens"] for log in run.state.log_history[:3]])
    assert counts[0] == counts[1]


def test_saving_seals_the_model(tmp_path):
    ours = trainer(tmp_path, defense=TVaccineConfig(num_active_layers=2))
    ours.train()
    ours.save_model()
    assert verify(tmp_path, defense="t_vaccine")["defended_steps"] == 3


def test_training_again_starts_a_new_record(tmp_path):
    ours = trainer(tmp_path, defense=TVaccineConfig(num_active_layers=2))
    ours.train()
    ours.train()
    ours.save_model()
    assert verify(tmp_path)["defended_steps"] == 3


def test_evaluation_during_training_is_undisturbed(tmp_path):
    tokenizer = build_tokenizer(WORLD)
    ours = SafetyDefenseSFTTrainer(
        model=with_lora(tiny_model(vocab_size=len(tokenizer))),
        args=config(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=rows(WORLD.hazards[:10], refuse=True),
        eval_dataset=rows(WORLD.hazards[10:12], refuse=True),
        processing_class=tokenizer,
        defense=VaccineConfig(),
    )
    ours.train()
    assert sum("eval_loss" in log for log in ours.state.log_history) == 3
    assert not any("safety/clean_loss" in log for log in ours.state.log_history if "eval_loss" in log)


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_both_of_trl_s_loss_paths_work(tmp_path, loss_type):
    ours = trainer(tmp_path, defense=TVaccineConfig(num_active_layers=2), loss_type=loss_type)
    ours.train()
    assert ours.state.log_history[0]["safety/perturbation_norm"] == pytest.approx(3.0, rel=1e-4)


def test_a_step_that_raises_leaves_the_model_as_it_was(tmp_path):
    ours = trainer(tmp_path, defense=TVaccineConfig(num_active_layers=2))
    before = [p.requires_grad for p in ours.model.parameters()]
    num_hooks = sum(len(m._forward_hooks) for m in ours.model.modules())

    def fail(*_):
        raise torch.OutOfMemoryError("pass 2")

    ours.host_step = fail
    with pytest.raises(torch.OutOfMemoryError):
        ours.train()
    assert [p.requires_grad for p in ours.model.parameters()] == before
    assert sum(len(m._forward_hooks) for m in ours.model.modules()) == num_hooks
    assert not (tmp_path / "safety_defense.json").exists()


def test_mistakes_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(
        ValueError,
        match="t_vaccine needs harmful prompts with harmful answers.*Pass them in a non-empty harmful_dataset",
    ):
        trainer(tmp_path, defense=TVaccineConfig(), harmful=False)
    with pytest.raises(ValueError, match="Set it to 4 or less"):
        trainer(tmp_path, defense=TVaccineConfig())
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        trainer(
            tmp_path, defense=VaccineConfig(), gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip


def in_fp16(run):
    """As on a GPU; accelerate refuses a CPU by name, though autocast and the loss scale work there."""
    run.accelerator.state._mixed_precision = "fp16"
    run.accelerator.native_amp = True
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return run


@pytest.mark.parametrize("defense", [TVaccineConfig(rho=0.5, num_active_layers=2), VaccineConfig(rho=0.5)])
def test_fp16_trains_as_float32_within_its_rounding(tmp_path, defense):
    runs, dtypes = [], set()
    for name in ("float32", "fp16"):
        run = trainer(tmp_path / name, defense=defense)
        if name == "fp16":
            layer = run.model.base_model.model.model.layers[0].self_attn
            layer.register_forward_hook(lambda _module, _inputs, output: dtypes.add(output[0].dtype))
            in_fp16(run)
        run.train()
        runs.append(run)
    assert dtypes == {torch.float16}
    for precise, rough in zip(*(run.state.log_history[:-1] for run in runs), strict=True):
        assert rough.keys() == precise.keys()
        for key in ("loss", "safety/clean_loss", "safety/perturbation_norm"):
            assert rough[key] == pytest.approx(precise[key], rel=2e-2), key
    before = weights(trainer(tmp_path / "untrained", defense=defense))
    # All weights together: where a gradient is rounding alone, Adam takes a step of full length in either direction.
    precise, rough = (torch.cat([w.flatten() for w in weights(run).values()]) for run in runs)
    start = torch.cat([before[name].flatten() for name in weights(runs[0])])
    assert (rough - precise).norm() <= 0.2 * (precise - start).norm()


def test_clean_loss_is_that_of_the_perturbed_rows(tmp_path):
    # rho 0 perturbs nothing: of a batch whose rows have answers of one length, the clean loss is the first row's mean
    whole, half = (
        trained(tmp_path / str(share), defense=VaccineConfig(rho=0.0, perturbed_share=share), max_steps=1)
        for share in (1.0, 0.5)
    )
    log, run = half.state.log_history[0], trainer(tmp_path / "again", defense=VaccineConfig())
    batch = next(iter(half.get_train_dataloader()))
    with torch.no_grad():
        first = run.model(**{name: value[:1] for name, value in batch.items()}).loss.item()
        both = run.model(**batch).loss.item()
    assert log["safety/clean_loss"] == pytest.approx(first, rel=1e-4)
    assert log["safety/perturbed_loss"] == pytest.approx(both, rel=1e-4)
    assert whole.state.log_history[0]["safety/clean_loss"] == pytest.approx(both, rel=1e-4)
