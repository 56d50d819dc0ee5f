"""Harm where the user's task is as far as without a defense, against straight-line computations."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tvac_plugin.chain.matching import Point, attack_curve, first_reached, harm_at, matched_utility
from tvac_plugin.chain.summary import summarise


def rated(percent, half=4.0, judge="procedure", prompts="p"):
    return {
        "percent": percent, "low": max(0.0, percent - half), "high": min(100.0, percent + half), "num_scored": 60,
        "num_unscored": 0, "judge": judge, "prompts_sha256": prompts,
    }  # fmt: skip


def curve_of(*points):
    return [Point(step, rated(harm), rated(task)) for step, harm, task in points]


def cell_of(defense, points, *, seed=1, start=True, cost=None, task_prompts="p"):
    """A cell whose attack went through `points` of step, harm and task; the first is the aligned model's."""
    (_, *first), *rest = points
    measures = [
        {"harmful_score": rated(harm), "task": rated(task, prompts=task_prompts)} for harm, task in
        (first, *(row[1:] for row in rest))
    ]  # fmt: skip
    curve = [{"step": row[0], **measured} for row, measured in zip(rest, measures[1:], strict=True)]
    return {
        "params": {"safety_defense": defense, "seed": seed}, "arm": [], "conditions": {"seed": seed}, "skipped": {},
        "defenses": {} if defense == "none" else {"align": defense}, "roles": {}, "status": "finished",
        "models": {"align": measures[0], "attack": measures[-1]}, "curves": {"attack": curve},
        "starts": {"attack": "align"} if start else {}, "attack_cost": {"attack": cost},
    }  # fmt: skip


def matched(*cells):
    """The cells' readings, and the entries of the summary."""
    cells = [dict(cell) for cell in cells]
    for cell, readings in zip(cells, matched_utility(cells, "task"), strict=True):
        cell["matched_utility"] = readings
    entries = summarise(cells, "task")
    return [cell["matched_utility"] for cell in cells], [entry["matched_utility"] for entry in entries]


UNDEFENDED = [(0, 0, 20), (10, 20, 60), (20, 60, 100)]


def test_between_two_points_all_is_linear():
    found = first_reached(curve_of((0, 0, 20), (10, 20, 60), (20, 60, 100)), 70.0)
    # a quarter of the way from 60 to 100: step 12.5, harm 20 + 40 / 4
    assert (found["step"], found["from_start"]) == (12.5, False)
    assert [found["harmful_score"][key] for key in ("percent", "low", "high")] == [30.0, 26.0, 34.0]


def test_ends_of_intervals_are_linear_each_for_itself():
    narrow, wide = rated(10.0, half=2.0), rated(50.0, half=10.0)
    found = first_reached([Point(0, narrow, rated(0.0)), Point(10, wide, rated(100.0))], 50.0)["harmful_score"]
    assert (found["low"], found["percent"], found["high"]) == ((8 + 40) / 2, 30.0, (12 + 60) / 2)


@pytest.mark.parametrize(
    ("target", "step", "harm"), [(60.0, 10, 20.0), (100.0, 20, 60.0)], ids=["in the middle", "at the end"]
)
def test_exactly_at_a_point_it_is_that_point(target, step, harm):
    found = first_reached(curve_of(*UNDEFENDED), target)
    assert (found["step"], found["harmful_score"]["percent"]) == (step, harm)


@pytest.mark.parametrize("target", [20.0, 5.0])
def test_what_is_there_before_the_attack_is_read_there(target):
    found = first_reached(curve_of(*UNDEFENDED), target)
    assert (found["step"], found["from_start"], found["harmful_score"]["percent"]) == (0, True, 0.0)


def test_what_is_never_reached_has_no_place():
    assert first_reached(curve_of(*UNDEFENDED), 100.5) is None
    assert first_reached([], 10.0) is None


def test_falling_back_does_not_move_the_first_place():
    found = first_reached(curve_of((0, 0, 0), (10, 10, 80), (20, 50, 40), (30, 90, 100)), 60.0)
    assert (found["step"], found["harmful_score"]["percent"]) == (7.5, 7.5)


def test_falling_before_rising_is_no_way_back_in_time():
    found = first_reached(curve_of((0, 0, 50), (10, 30, 10), (20, 70, 90)), 60.0)
    assert found["step"] == pytest.approx(10 + 10 * 50 / 80)
    assert found["harmful_score"]["percent"] == pytest.approx(30 + 40 * 50 / 80, abs=1e-4)


def test_random_curves_agree_with_walking_along_them():
    draw = random.Random(0)
    for _ in range(100):
        rows = [(10 * n, draw.uniform(0, 100), draw.uniform(0, 100)) for n in range(7)]
        target = draw.uniform(0, 110)
        steps, harms, tasks = (np.array(column) for column in zip(*rows, strict=True))
        walk = np.linspace(0, 60, 600_001)
        there = np.nonzero(np.interp(walk, steps, tasks) >= target)[0]
        found = first_reached(curve_of(*rows), target)
        assert (found is None) == (len(there) == 0)
        if found is not None:
            assert found["step"] == pytest.approx(walk[there[0]], abs=1e-3)
            walked = np.interp(walk[there[0]], steps, harms)
            assert found["harmful_score"]["percent"] == pytest.approx(walked, abs=0.02)


def test_harm_at_a_step_is_linear_in_steps_and_nothing_outside():
    curve = curve_of(*UNDEFENDED)
    assert [harm_at(curve, step)["percent"] for step in (0, 5, 10, 15, 20)] == [0, 10, 20, 40, 60]
    assert harm_at(curve, 21) is None
    assert harm_at(curve[1:], 5) is None


def test_a_defended_cell_is_read_at_shares_of_the_undefended_best():
    slow = [(0, 0, 0), (10, 2, 40), (20, 6, 90)]
    (_, readings), (_, summary) = matched(cell_of("none", UNDEFENDED), cell_of("vaccine", slow))
    reading = readings["attack"]
    assert (reading["best"], reading["best_share"], reading["learns"]) == (100.0, 90.0, True)
    at_80, at_90 = reading["at"]
    # task 80: four fifths from 40 to 90, harm 2 + 0.8 * 4; undefended half-way, harm 40
    assert (at_80["target"], at_80["step"], at_80["harmful_score"]["percent"]) == (80.0, 18.0, 5.2)
    assert (at_90["target"], at_90["step"], at_90["harmful_score"]["percent"]) == (90.0, 20.0, 6.0)
    # Newcombe's interval from 5.2 (1.2 to 9.2... linear between 0 to 6 and 2 to 10) and 40 (36 to 44)
    low = 5.2 - 40 - math.hypot(5.2 - (0 + 0.8 * 2), 4)
    high = 5.2 - 40 + math.hypot(4, 4)
    change = at_80["against_none"]
    assert [change[key] for key in ("points", "low", "high")] == pytest.approx([-34.8, low, high], abs=1e-4)
    # at the undefended user's step 15 the defended model's harm is 4
    assert at_80["at_equal_steps"]["points"] == pytest.approx(4 - 40)
    assert [at["verdict"] for at in summary["attack"]["at"]] == ["less", "less"]


def test_an_undefended_cell_is_read_at_shares_of_its_own_best_and_compared_with_nothing():
    (readings,), (summary,) = matched(cell_of("none", UNDEFENDED, cost=20))
    at = readings["attack"]["at"][0]
    assert (at["step"], at["harmful_score"]["percent"]) == (15.0, 40.0)
    assert "against_none" not in at
    assert readings["attack"]["cost_share"] == 100.0
    assert summary["attack"]["at"][0]["verdict"] is None


def test_the_cost_of_an_attack_has_the_task_s_share_beside_it():
    (_, readings), (_, summary) = matched(
        cell_of("none", UNDEFENDED), cell_of("vaccine", [(0, 0, 0), (10, 55, 30), (20, 60, 50)], cost=10)
    )
    assert readings["attack"]["cost_share"] == 30.0
    assert summary["attack"]["cost_share"] == [30.0]


def test_a_task_that_is_never_learnt_is_a_result():
    (_, readings), (_, summary) = matched(
        cell_of("none", UNDEFENDED), cell_of("vaccine", [(0, 0, 0), (10, 0, 55), (20, 0, 30)])
    )
    assert readings["attack"]["best_share"] == 55.0
    assert [(at["reached"], at["harmful_score"], at["against_none"]) for at in readings["attack"]["at"]] == [
        (False, None, None)
    ] * 2
    assert [(at["num_reached"], at["verdict"]) for at in summary["attack"]["at"]] == [(0, "never")] * 2


def test_an_undefended_user_who_never_does_the_task_leaves_nothing_to_match():
    never = [(0, 0, 0), (10, 50, 0)]
    readings, summary = matched(cell_of("none", never), cell_of("vaccine", [(0, 0, 0), (10, 0, 50)]))
    for found in (readings[1]["attack"], summary[1]["attack"]):
        assert found["at"] == []
        assert found["best"] == 0
    assert readings[1]["attack"]["learns"] is False
    assert readings[1]["attack"]["best_share"] is None


def test_an_undefended_user_who_gets_no_better_is_read_before_the_attack():
    falling = [(0, 1, 50), (10, 60, 30)]
    (none, vaccine), _ = matched(cell_of("none", falling), cell_of("vaccine", [(0, 2, 48), (10, 20, 30)]))
    assert not none["attack"]["learns"]
    assert [at["harmful_score"]["percent"] for at in none["attack"]["at"]] == [1.0, 1.0]
    assert vaccine["attack"]["at"][0]["undefended_from_start"]
    assert vaccine["attack"]["at"][0]["against_none"]["points"] == 1.0


@pytest.mark.parametrize(
    ("defended", "verdict"),
    [
        ([(0, 0, 0), (20, 20, 40), (40, 60, 100)], "slower"),
        ([(0, 0, 0), (10, 0, 40), (20, 1, 100)], "less"),
        ([(0, 0, 20), (10, 20, 60), (20, 60, 100)], "same"),
        ([(0, 0, 20), (10, 90, 60), (20, 95, 100)], "more"),
    ],
)
def test_the_verdict_tells_slower_learning_from_less_harm(defended, verdict):
    _, (_, summary) = matched(cell_of("none", UNDEFENDED), cell_of("vaccine", defended))
    assert summary["attack"]["at"][0]["verdict"] == verdict


@pytest.mark.parametrize(("task_at_the_end", "verdict"), [(80, "slower"), (99, "more")])
def test_less_harm_at_the_end_is_slower_learning_where_the_task_is_less_too(task_at_the_end, verdict):
    known_before = [(0, 0, 95), (10, 50, 96), (20, 80, 100)]
    late = [(0, 0, 0), (10, 10, 70), (20, 20, task_at_the_end)]
    _, (_, summary) = matched(cell_of("none", known_before), cell_of("vaccine", late))
    at = summary["attack"]["at"][0]
    assert at["at_equal_steps"]["points"] == 0
    assert (at["verdict"], at["against_none"]["points"] > 0) == (verdict, True)


def test_seeds_are_paired_and_pooled_over_those_that_reach_it():
    defended = ([(0, 0, 0), (20, 10, 100)], [(0, 0, 0), (20, 30, 100)], [(0, 0, 0), (20, 0, 50)])
    cells = [cell_of("none", UNDEFENDED, seed=seed) for seed in (1, 2, 3)]
    cells += [cell_of("vaccine", points, seed=seed, cost=20) for seed, points in enumerate(defended, start=1)]
    at = matched(*cells)[1][1]["attack"]["at"][0]
    assert (at["num_seeds"], at["num_reached"], at["steps"]) == (3, 2, [16.0, 16.0, None])
    assert [at["harmful_score"][key] for key in ("percent", "min", "max")] == [16.0, 8.0, 24.0]
    # 8 - 40 and 24 - 40: mean -24, Student's 12.706 * 11.3137 / sqrt(2)
    change = at["against_none"]
    assert (change["points"], change["num_seeds"]) == (-24.0, 2)
    assert change["low"] == -100.0
    assert change["high"] == pytest.approx(-24 + 12.7062 * 11.3137 / 2**0.5, abs=0.01)
    assert matched(*cells)[1][1]["attack"]["best_share"] == [100.0, 100.0, 50.0]
    assert matched(*cells)[1][1]["attack"]["cost_share"] == [100.0, 100.0, 50.0]


def test_a_seed_whose_undefended_run_failed_is_left_out():
    cells = [cell_of(defense, UNDEFENDED, seed=seed) for defense in ("none", "vaccine") for seed in (1, 2)]
    cells[0] |= {"status": "failed", "models": {}, "curves": {}, "starts": {}, "attack_cost": {}}
    readings, summary = matched(*cells)
    assert [bool(reading) for reading in readings] == [False, True, False, True]
    assert summary[1]["attack"]["num_seeds"] == 1
    assert summary[1]["attack"]["cost_share"] == [None, None]


def test_other_tasks_are_not_matched_and_other_judges_not_compared():
    none = cell_of("none", UNDEFENDED)
    assert matched(none, cell_of("vaccine", UNDEFENDED, task_prompts="other"))[0][1] == {}
    judged = cell_of("vaccine", UNDEFENDED)
    for point in (judged["models"]["align"], *judged["curves"]["attack"]):
        point["harmful_score"]["judge"] = "keyword"
    at = matched(none, judged)[1][1]["attack"]["at"][0]
    assert (at["num_reached"], at["against_none"], at["verdict"]) == (1, None, None)


def test_a_curve_without_the_aligned_model_starts_at_its_first_checkpoint():
    cell = cell_of("none", [(0, 0, 20), (20, 60, 100), (10, 20, 95)], start=False)
    assert [point.step for point in attack_curve(cell, "attack", "task")] == [10, 20]
    (readings,), _ = matched(cell)
    at = readings["attack"]["at"][0]
    assert (at["step"], at["from_start"]) == (10, True)
    assert attack_curve(cell, "attack", "benign") == []
