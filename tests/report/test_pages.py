"""The report shows results.json and nothing else, and model output cannot harm it."""

from __future__ import annotations

import copy
import statistics

import pytest

from tvac_plugin.chain.summary import summarise
from tvac_plugin.report.charts import Series, heat_map, line_chart, ticks
from tvac_plugin.report.pages import html, markdown
from tvac_plugin.report.tables import label
from tvac_plugin.report.terminal import chain_table

EVIL = '<script>alert("x")</script>'


def rated(percent, *, judge="procedure", prompts="p"):
    return {
        "percent": percent, "low": max(0.0, percent - 5), "high": min(100.0, percent + 5), "num_scored": 60,
        "num_unscored": 2, "judge": judge, "judge_note": "note", "prompts_sha256": prompts,
    }  # fmt: skip


def curve_of(percent, **options):
    return [{"step": step, "harmful_score": rated(percent * step / 20, **options)} for step in (10, 20)]


def cell_of(params, percent, *, arm=(), **options):
    defense = params.get("safety_defense", "none")
    return {
        "params": params, "arm": list(arm), "defenses": {} if defense == "none" else {"align": defense}, "skipped": {},
        "conditions": {key: value for key, value in params.items() if key in ("seed", "harmful_ratio")},
        "status": "finished", "problems": [], "jobs": {}, "roles": {"attack": "attacked"},
        "models": {"attack": {"harmful_score": rated(percent, **options)}},
        "curves": {"attack": curve_of(percent, **options)}, "attack_cost": {"attack": 20},
        "samples": {"attack": [{"prompt": "q", "answer": EVIL, "harmful": True}]},
    }  # fmt: skip


def results_of(*cells):
    return {
        "format": 3, "utility": "task", "asked": {"attack_threshold": 50.0}, "versions": {}, "hardware": {},
        "cells": list(cells), "summary": summarise(list(cells)),
        "jobs": {"align": {
            "status": "finished", "stage": "align", "seconds": 3, "peak_memory_mb": 5, "recipe": {"note": EVIL},
            "losses": [[1, 2.0], [2, 1.0]],
            "trace": [{"step": 0, "event": "probe", "scores": [1, 2, 3]}, {"step": 0, "event": "draw", "layers": [1]}],
        }},
    }  # fmt: skip


NONE, VACCINE = {"safety_defense": "none"}, {"safety_defense": "vaccine"}


def test_model_output_and_recipes_are_escaped_and_masked():
    page = html(results_of(cell_of(NONE, 80.0)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert '<span class="masked" tabindex="0">' in page
    assert "http" not in page.replace("http-equiv", ""), "opens from disk without a network"


def test_the_markdown_has_the_table_and_the_words():
    page = markdown(results_of(cell_of(NONE, 80.0), cell_of(VACCINE, 20.0)))
    assert "| vaccine | attack | 20.0 (15.0 to 25.0, n = 60, 2 unscored) |" in page
    assert "harmful score: -60.0 points against no defense (95 % -67.1 to -52.9)." in page
    assert "harmful score above 50 %: after 20 steps." in page
    assert "align: layers drawn, times: 1: 1." in page


def retained(ratio):
    return {
        "loss": ratio, "base_loss": 1.0, "ratio": ratio, "low": ratio - 0.25, "high": ratio + 0.25, "num_rows": 40,
        "num_tokens": 900, "of": "the_base", "prompts_sha256": "q",
    }  # fmt: skip


def test_the_loss_of_benign_answers_is_shown_as_a_ratio_and_not_in_percent():
    cells = [*seeded(NONE, [90.0, 60.0]), *seeded(VACCINE, [70.0, 38.0])]
    for cell, ratio in zip(cells, (1.0, 1.25, 2.0, 3.0), strict=True):
        cell["models"]["attack"]["retention"] = retained(ratio)
    results = results_of(*cells)
    found = results["summary"][0]["models"]["attack"]["retention"]
    assert (found["ratio"], found["min"], found["max"], found["num_seeds"]) == (1.125, 1.0, 1.25, 2)
    assert (found["low"], found["high"]) == (0.0, pytest.approx(1.125 + 12.706 * 0.125, abs=1e-3))
    assert "retention" not in results["summary"][1]["against_none"]["attack"]
    page = markdown(results)
    assert "| harmful score % | loss ratio |" in page
    assert "| 2.500 (min 2.000, max 3.000 of 2 seeds; 95 % " in page
    assert "| 2.000 (1.750 to 2.250, n = 40) |" in page
    assert "- retention: loss per token of benign answers, divided by that of the_base; above 1 is worse." in page
    assert "<b>2.000</b><small>1.750 to 2.250, n = 40</small>" in html(results)
    assert "<th>loss ratio</th>" in html(results)


def test_answers_that_are_neither_harmful_nor_refusals_are_counted_beside_the_score():
    cells = seeded(NONE, [90.0, 60.0])
    for cell, count in zip(cells, (3, 4), strict=True):
        cell["models"]["attack"]["harmful_score"]["num_neither"] = count
    results = results_of(*cells)
    for page in (markdown(results), html(results)):
        assert "neither: not harmful and no refusal either" in page
    for page in (markdown(results), html(results), chain_table(results)):
        assert "n = 120, 7 neither, 4 unscored" in page
    assert "n = 60, 4 neither, 2 unscored" in html(results)
    assert "neither" not in markdown(results_of(cell_of(NONE, 90.0)))


def test_a_difference_within_the_noise_is_called_that():
    page = markdown(results_of(cell_of(NONE, 50.0), cell_of(VACCINE, 48.0)))
    assert "-2.0 points against no defense (95 % -9.1 to +5.1), within the noise." in page


def test_numbers_of_other_judges_or_prompts_are_neither_compared_nor_drawn_together():
    results = results_of(cell_of(NONE, 80.0), cell_of(VACCINE, 20.0, judge="keyword"))
    assert results["summary"][1]["against_none"] == {}
    assert "Not comparable, so not drawn: vaccine." in html(results)
    other = results_of(cell_of(NONE, 80.0), cell_of(VACCINE, 20.0, prompts="other"))
    assert other["summary"][1]["against_none"] == {}


def test_seeds_are_averaged_with_student_s_interval():
    cells = [cell_of(NONE | {"seed": seed}, percent) for seed, percent in ((1, 70.0), (2, 80.0), (3, 90.0))]
    (entry,) = summarise(cells)
    found = entry["models"]["attack"]["harmful_score"]
    # mean 80, standard error 10 / sqrt(3), t(2) = 4.30265
    assert found["percent"] == 80.0
    assert found["low"] == pytest.approx(80 - 4.30265 * 10 / 3**0.5, abs=1e-3)
    assert found["high"] == 100.0
    assert (found["num_seeds"], found["num_scored"]) == (3, 180)


@pytest.mark.parametrize(
    ("num_seeds", "t95"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2, column 0.975
    [(2, 12.706), (3, 4.303), (4, 3.182), (10, 2.262), (11, 2.228), (21, 2.086), (31, 2.042)],
)
def test_student_s_interval_is_that_of_the_number_of_seeds(num_seeds, t95):
    percents = [40.0, 60.0] * (num_seeds // 2) + [50.0] * (num_seeds % 2)
    cells = [cell_of(NONE | {"seed": seed}, percent) for seed, percent in enumerate(percents)]
    found = summarise(cells)[0]["models"]["attack"]["harmful_score"]
    half = t95 * statistics.stdev(percents) / num_seeds**0.5
    assert found["high"] == pytest.approx(min(100, 50 + max(half, 5)), abs=0.01)


def test_an_interval_over_seeds_is_never_narrower_than_the_runs_own():
    cells = [cell_of(NONE | {"seed": seed}, 40.0) for seed in (1, 2, 3)]
    found = summarise(cells)[0]["models"]["attack"]["harmful_score"]
    assert (found["low"], found["high"], found["min"], found["max"]) == (35.0, 45.0, 40.0, 40.0)


def seeded(params, percents):
    return [cell_of(params | {"seed": seed}, percent) for seed, percent in enumerate(percents, start=1)]


def test_differences_over_seeds_are_paired():
    cells = [*seeded(NONE, [90.0, 60.0, 75.0]), *seeded(VACCINE, [70.0, 38.0, 57.0])]
    change = summarise(cells)[1]["against_none"]["attack"]["harmful_score"]
    # -20, -22 and -18: mean -20, Student's 4.303 * 2 / sqrt(3) = 4.97, over prompts the hypotenuse of 5 and 5 = 7.07
    assert (change["points"], change["min"], change["max"], change["num_seeds"]) == (-20.0, -22.0, -18.0, 3)
    assert (change["low"], change["high"]) == pytest.approx((-27.0711, -12.9289))
    assert not change["within_noise"]
    page = markdown(results_of(*cells))
    assert (
        "vaccine, attack, harmful score: -20.0 points against no defense (mean of the differences of 3 "
        "seeds, -22.0 to -18.0; 95 % -27.1 to -12.9)."
    ) in page
    assert "| 75.0 (min 60.0, max 90.0 of 3 seeds; 95 % 37.7 to 100.0, n = 180, 6 unscored) |" in page
    assert "| none, seed 2 | attack | 60.0 (55.0 to 65.0, n = 60, 2 unscored) |" in page
    assert "<h2>Every run</h2>" in html(results_of(*cells))


def test_no_interval_of_a_difference_goes_beyond_a_hundred_points():
    cells = [*seeded(NONE, [70.0, 99.0, 85.0]), *seeded(VACCINE, [0.0, 0.0, 0.0])]
    change = summarise(cells)[1]["against_none"]["attack"]["harmful_score"]
    assert change["low"] == -100.0
    assert change["high"] < -40.0


def test_only_seeds_that_both_sides_have_are_compared():
    cells = [*seeded(NONE, [90.0, 60.0]), *seeded(VACCINE, [70.0, 38.0])]
    cells[0] |= {"status": "failed", "models": {}}
    change = summarise(cells)[1]["against_none"]["attack"]["harmful_score"]
    assert change["points"] == -22.0
    assert "num_seeds" not in change


def test_arms_are_compared_under_the_same_conditions():
    none, vaccine = ([{**params, "harmful_ratio": ratio} for ratio in (0.1, 0.2)] for params in (NONE, VACCINE))
    vaccine = [params | {"align.x": 1} for params in vaccine]
    cells = [cell_of(params, percent) for params, percent in zip([*none, *vaccine], (50, 90, 40, 60), strict=True)]
    changes = [entry["against_none"]["attack"]["harmful_score"]["points"] for entry in summarise(cells)[2:]]
    assert changes == [-10, -30]
    lonely = [cell_of(none[0], 50.0), cell_of(vaccine[1], 40.0)]
    assert summarise(lonely)[1]["against_none"] == {}


def test_an_arm_is_labelled_in_short():
    params = {"safety_defense": "t_vaccine", "extrapolate.coefficient": 1.25, "harmful_ratio": 0.1}
    entry = {"params": params, "arm": ["safety_defense", "extrapolate.coefficient"]}
    assert label(entry) == "t_vaccine + extrapolate.coefficient=1.25, harmful_ratio 0.1"
    assert label({"params": params | {"seed": 1}, "arm": []}).startswith("t_vaccine, extrapolate.coefficient 1.25")


def test_one_line_is_drawn_for_all_seeds_of_an_arm():
    page = html(results_of(*seeded(NONE, [90.0, 60.0]), *seeded(VACCINE, [10.0, 20.0])))
    assert "<title>none: 75.0 at 20</title>" in page
    assert "seed 1:" not in page.split("<figure>")[1].split("</figure>")[0]


def test_a_seventh_line_is_told_from_the_first():
    chart = line_chart([Series(str(n), [(0, n, None, None)], "") for n in range(7)], x_label="x", y_label="y")
    assert chart.count('"line s0"') == 1
    assert 'class="line s0 dashed"' in chart
    assert 'class="key s0 dashed"' in chart


def test_every_attack_has_its_own_curve_and_cost():
    cell = cell_of(NONE, 80.0)
    cell["curves"]["again"] = curve_of(40.0)
    cell["attack_cost"]["again"] = None
    cell["roles"]["again"] = "attacked"
    results = results_of(cell)
    assert results["summary"][0]["attack_cost"] == {"attack": [20], "again": [None]}
    page = markdown(results)
    assert "none, attack: harmful score above 50 %: after 20 steps." in page
    assert "none, again: harmful score above 50 %: not within the attack." in page
    assert "<title>none, attack: 80.0 at 20</title>" in html(results)
    assert "<title>none, again: 40.0 at 20</title>" in html(results)


def ratio_chart(*cells):
    return html(results_of(*cells)).partition("the share of harmful rows</h2>")[2].partition("</figure>")[0]


def test_what_is_drawn_against_the_ratio_is_the_attacked_model_wherever_it_stands():
    cells = [cell_of(NONE | {"harmful_ratio": ratio}, 100 * ratio) for ratio in (0.1, 0.2)]
    for cell in cells:
        cell["models"]["base"] = {"harmful_score": rated(77.0)}
        cell["roles"]["base"] = "base"
    chart = ratio_chart(*cells)
    assert "<title>none: 20.0 at 0.2</title>" in chart
    assert "77.0" not in chart
    for cell in cells:
        cell["models"]["again"] = {"harmful_score": rated(55.0)}
        cell["roles"]["again"] = "attacked"
    chart = ratio_chart(*cells)
    assert "<title>none, attack: 20.0 at 0.2</title>" in chart
    assert "<title>none, again: 55.0 at 0.2</title>" in chart


def test_a_failed_cell_is_in_the_report():
    failed = copy.deepcopy(cell_of(VACCINE, 0.0)) | {
        "status": "failed", "problems": ["align: exit code 1"], "models": {}, "curves": {}, "attack_cost": {},
        "samples": {},
    }  # fmt: skip
    results = results_of(cell_of(NONE, 80.0), failed)
    assert "failed: align: exit code 1" in html(results)
    assert "vaccine: FAILED. align: exit code 1" in markdown(results)


def test_charts_of_nothing_are_empty():
    assert line_chart([], x_label="x", y_label="y") == line_chart([Series("a", [], "")], x_label="x", y_label="y") == ""
    assert heat_map([], []) == ""


def test_a_heat_map_shows_every_draw_of_a_run_of_common_size():
    draws = [{"step": 20 * n, "layers": [n % 32, 31]} for n in range(250)]
    chart = heat_map(draws, [{"scores": [0.5] * 32}])
    assert chart.count('class="on"') == sum(len(set(draw["layers"])) for draw in draws)
    assert "left out" not in chart
    assert "is shown" not in chart
    assert "step 4980, layer 31" in chart


def test_a_chart_keeps_its_points_in_the_frame():
    chart = line_chart([Series("a", [(0, 0, 0, 5), (10, 100, 90, 120)], "")], x_label="x", y_label="y", y_max=100)
    assert 'points="48.0,244.0 628.0,28.0"' in chart


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (5, 40, [10, 20, 30, 40]),
        (0, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (0, 2.37, [0, 0.5, 1, 1.5, 2]),
        (20, 600, [100, 200, 300, 400, 500, 600]),
        (7, 7, [7]),
    ],
)
def test_axes_are_marked_at_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)
