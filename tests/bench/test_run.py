from __future__ import annotations

import random

import pytest
import torch

from tests.bench.conftest import TINY
from tvac_plugin.bench.cases import OFF, PLAIN, built_cases
from tvac_plugin.bench.results import Results
from tvac_plugin.bench.run import benchmark, scaled_shapes
from tvac_plugin.bench.settings import MEASURED, Settings, defense_settings
from tvac_plugin.bench.shape import Shape, random_rows, word_tokenizer
from tvac_plugin.bench.tables import bench_text
from tvac_plugin.bench.timing import ratio, turns
from tvac_plugin.data.taught_answers import decoding, num_taught


def test_the_plugin_without_a_defense_is_sft_bit_for_bit():
    with built_cases(TINY, Settings(defenses=[], threads=1)) as cases:
        found = {}
        for name, case in cases.items():
            loss = case.step(0)
            found[name] = [loss, *(p.grad.clone() for p in case.model.parameters() if p.grad is not None)]
            case.clear()
    assert len(found[PLAIN]) == 1 + 2 * 7 * TINY.num_layers
    assert all(torch.equal(a, b) for a, b in zip(found[PLAIN], found[OFF], strict=True))
    assert all((gradient != 0).any() for gradient in found[PLAIN][1:])


def test_rows_stay_different_when_they_are_read_as_text():
    shape = Shape()
    ours, theirs = (random_rows(shape, 8 * shape.batch_size, seed=166, answer_seed=seed) for seed in (175, 176))
    assert num_taught(ours, theirs, decoding(word_tokenizer(shape))) == 0
    assert num_taught(ours, ours, decoding(word_tokenizer(shape))) == len(ours)


def test_a_digest_tells_gradients_apart():
    with built_cases(TINY, Settings(defenses=["vaccine"], threads=1)) as cases:
        digests = {name: case.digest(case.step(0)) for name, case in cases.items() if case.clear() is None}
    assert digests[PLAIN] == digests[OFF] != digests["vaccine"]


def test_counts_are_the_same_in_every_run(results):
    again = benchmark(TINY, results.settings.model_copy(update={"repeats": 0}))
    for name, case in results.main.cases.items():
        exact = {"layers", "layer_forwards", "layer_backwards", "flops", "saved_bytes"}
        assert [d.model_dump(include=exact) for d in case.draws] == [
            d.model_dump(include=exact) for d in again.main.cases[name].draws
        ]
    assert again.main.cases[PLAIN].seconds == []
    assert again.main.cases[PLAIN].time_ratio is None


def test_each_defense_makes_the_passes_of_its_algorithm(results):
    num_layers = TINY.num_layers
    sft, off, vaccine = (results.main.cases[name].draws[0] for name in (PLAIN, OFF, "vaccine"))
    assert (sft.layer_forwards, sft.layer_backwards) == (num_layers, num_layers)
    assert off.model_dump(exclude={"peak_bytes", "rise_bytes"}) == sft.model_dump(exclude={"peak_bytes", "rise_bytes"})
    assert results.main.cases[OFF].same_as_sft
    assert vaccine.layer_backwards == 2 * num_layers
    drawn = [draw.layers for draw in results.main.cases["t_vaccine"].draws]
    assert len({tuple(layers) for layers in drawn}) > 1
    for draw in results.main.cases["t_vaccine"].draws:
        assert len(draw.layers) == TINY.num_active_layers
        assert draw.layer_backwards == 2 * (num_layers - min(draw.layers)), "neither pass goes below the lowest"
        assert 2 * num_layers - min(draw.layers) <= draw.layer_forwards <= 2 * num_layers


def test_more_drawn_layers_save_more(results):
    saved = {min(draw.layers): draw.saved_bytes for draw in results.main.cases["t_vaccine"].draws}
    assert sorted(saved.values(), reverse=True) == [saved[layer] for layer in sorted(saved)]
    assert max(saved.values()) < results.main.cases["vaccine"].draws[0].saved_bytes


def test_every_step_is_timed_in_every_round(results):
    cases = results.main.cases
    assert [len(row) for row in cases["t_vaccine"].seconds] == [3, 3]
    assert [len(row) for row in cases["vaccine"].seconds] == [1, 1]
    assert [len(row) for row in cases[PLAIN].seconds] == [len(row) for row in cases[OFF].seconds] == [1, 1]
    assert cases[PLAIN].time_ratio == pytest.approx(1)
    assert all(time > 0 for case in cases.values() for row in case.seconds for time in row)


def test_memory_is_read_on_linux(results):
    draw = results.main.cases[PLAIN].draws[0]
    assert draw.peak_bytes is None or draw.peak_bytes > draw.rise_bytes >= 0


def test_results_come_back_from_json(results):
    assert Results.model_validate_json(results.model_dump_json()) == results


def test_all_defenses_can_be_measured_in_another_precision():
    shape = TINY.model_copy(update={"num_layers": 1, "attention": "sdpa", "dtype": "bfloat16"})
    once = {"tar": {"inner_steps": 1, "tamper_every": 1}}
    found = benchmark(shape, Settings(repeats=0, draws=1, threads=1, host_metrics=False, changes=once))
    assert list(found.main.cases) == [PLAIN, OFF, *MEASURED]
    assert all(case.draws[0].saved_bytes > 0 for case in found.main.cases.values())


def test_trl_s_chunked_loss_saves_less(results):
    shape = TINY.model_copy(update={"loss_type": "chunked_nll"})
    found = benchmark(shape, Settings(repeats=0, defenses=[], threads=1)).main.cases[PLAIN].draws[0]
    assert found.saved_bytes < results.main.cases[PLAIN].draws[0].saved_bytes


def test_turns_take_every_draw_once_with_sft_and_off_side_by_side():
    with built_cases(TINY, Settings(defenses=["t_vaccine"], draws=5, threads=1)) as cases:
        order = list(turns(cases, random.Random(0)))
    assert sorted(order) == sorted(
        [*((name, turn) for name in (PLAIN, OFF) for turn in range(2)), *(("t_vaccine", draw) for draw in range(5))]
    )
    assert [{name for name, _ in order[i : i + 2]} for i in (0, 6)] == [{PLAIN, OFF}] * 2


def test_a_ratio_is_the_mean_over_draws_of_medians_over_rounds():
    reference = [[1.0, 1.0, 9.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]
    seconds = [[1.0, 3.0], [4.0, 6.0], [1.5, 90.0]]
    found = ratio(seconds, reference)
    assert found.middle == pytest.approx((1.5 + 3.0) / 2), "medians of 1, 2, 1.5 and of 3, 3, 90"
    assert found.low == pytest.approx(2.25)
    assert ratio([], []) is None


def test_scaling_varies_one_size_at_a_time_and_leaves_out_what_cannot_be():
    shapes = scaled_shapes(Shape(num_layers=16, hidden_size=64, num_active_layers=8))
    assert [(name, getattr(shape, name)) for name, shape in shapes] == [
        ("num_layers", 8), ("num_layers", 32), ("hidden_size", 128), ("sequence_len", 64), ("sequence_len", 256),
        ("num_active_layers", 2), ("num_active_layers", 4), ("num_active_layers", 16),
    ]  # fmt: skip
    least = scaled_shapes(Shape(num_layers=1, hidden_size=64, sequence_len=2, num_active_layers=1))
    assert [(name, getattr(shape, name)) for name, shape in least] == [
        ("num_layers", 2), ("hidden_size", 128), ("sequence_len", 4),
    ]  # fmt: skip


def test_settings_can_be_changed_for_one_defense():
    settings = Settings(changes={"t_vaccine": {"perturb": "mlp"}})
    assert defense_settings("t_vaccine", TINY, settings).perturb == "mlp"
    assert defense_settings("vaccine", TINY, settings).perturb == "attention"


def test_a_defense_whose_probes_alone_draw_is_given_other_layers_in_every_draw():
    found = benchmark(TINY, Settings(defenses=["oasis"], repeats=0, draws=6, threads=1)).main.cases["oasis"]
    assert len({tuple(draw.layers) for draw in found.draws}) > 1
    for draw in found.draws:
        assert draw.layer_backwards == 2 * (TINY.num_layers - min(draw.layers)), "there is no probe among them"
    known = Settings(defenses=["oasis"], repeats=0, draws=2, threads=1, probabilities=[0.2, 0.5, 0.3])
    found = benchmark(TINY, known)
    assert [draw.layers for draw in found.main.cases["oasis"].draws] == [[1], [1]]
    assert "its mean is 1.00, and 1.00 in that of --draws-from" in bench_text(found)


def test_layers_are_drawn_with_the_probabilities_given():
    settings = Settings(
        defenses=["t_vaccine"], repeats=0, draws=6, threads=1, probabilities=[0.0001, 0.0001, 0.9998]
    )  # fmt: skip
    found = benchmark(TINY, settings)
    assert [draw.layers for draw in found.main.cases["t_vaccine"].draws] == [[2]] * 6
    assert "its mean is 2.00, and 2.00 in that of --draws-from" in bench_text(found)
