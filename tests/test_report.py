"""The report shows results.json and nothing else, and model output cannot harm it."""

from __future__ import annotations

import copy
import json

import pytest
from click.testing import CliRunner

from tvac_plugin.chain.summary import summarise
from tvac_plugin.cli import tvac
from tvac_plugin.report.charts import Series, heat_map, line_chart
from tvac_plugin.report.pages import html, markdown
from tvac_plugin.report.tables import label

EVIL = '<script>alert("x")</script>'


def rated(percent, *, judge="exact", prompts="p"):
    return {
        "percent": percent, "low": max(0.0, percent - 5), "high": min(100.0, percent + 5), "num_scored": 60,
        "num_unscored": 2, "judge": judge, "judge_note": "note", "prompts_sha256": prompts,
    }  # fmt: skip


def cell_of(params, percent, *, arm=(), **options):
    defense = params.get("safety_defense", "none")
    return {
        "params": params, "arm": list(arm), "defenses": {} if defense == "none" else {"align": defense}, "skipped": {},
        "conditions": {key: value for key, value in params.items() if key in ("seed", "harmful_ratio")},
        "status": "finished", "problems": [], "jobs": {}, "attack_cost": 20,
        "models": {"attack": {"harmful_score": rated(percent, **options)}},
        "curve": [{"step": step, "harmful_score": rated(percent * step / 20, **options)} for step in (10, 20)],
        "samples": {"attack": [{"prompt": "q", "answer": EVIL, "harmful": True}]},
    }  # fmt: skip


def results_of(*cells):
    return {
        "format": 1, "asked": {"attack_threshold": 50.0}, "versions": {}, "hardware": {}, "cells": list(cells),
        "summary": summarise(list(cells)),
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
    assert "| safety_defense vaccine | attack | 20.0 (15.0 to 25.0, n = 60, 2 unscored) |" in page
    assert "harmful score: -60.0 points against no defense (95 % -67.1 to -52.9)." in page
    assert "harmful score above 50 %: after 20 steps." in page
    assert "align: layers drawn, times: 1: 1." in page


def test_a_difference_within_the_noise_is_called_that():
    page = markdown(results_of(cell_of(NONE, 50.0), cell_of(VACCINE, 48.0)))
    assert "-2.0 points against no defense (95 % -9.1 to +5.1), within the noise." in page


def test_numbers_of_other_judges_or_prompts_are_neither_compared_nor_drawn_together():
    results = results_of(cell_of(NONE, 80.0), cell_of(VACCINE, 20.0, judge="keyword"))
    assert results["summary"][1]["against_none"] == {}
    assert "Not comparable, so not drawn: safety_defense vaccine." in html(results)
    other = results_of(cell_of(NONE, 80.0), cell_of(VACCINE, 20.0, prompts="other"))
    assert other["summary"][1]["against_none"] == {}


def test_seeds_are_averaged_with_student_s_interval():
    cells = [cell_of(NONE | {"seed": seed}, percent) for seed, percent in ((1, 70.0), (2, 80.0), (3, 90.0))]
    (entry,) = summarise(cells)
    found = entry["models"]["attack"]["harmful_score"]
    # mean 80, standard error 10 / sqrt(3), t(2) = 4.303
    assert found["percent"] == 80.0
    assert found["low"] == pytest.approx(80 - 4.303 * 10 / 3**0.5, abs=1e-3)
    assert found["high"] == 100.0
    assert (found["num_seeds"], found["num_scored"]) == (3, 180)


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
        "safety_defense vaccine, attack, harmful score: -20.0 points against no defense (mean of the differences of 3 "
        "seeds, -22.0 to -18.0; 95 % -27.1 to -12.9)."
    ) in page
    assert "| 75.0 (min 60.0, max 90.0 of 3 seeds; 95 % 37.7 to 100.0, n = 180, 6 unscored) |" in page
    assert "| safety_defense none, seed 2 | attack | 60.0 (55.0 to 65.0, n = 60, 2 unscored) |" in page
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
    assert label({"params": params | {"seed": 1}}).startswith("safety_defense t_vaccine, extrapolate.coefficient 1.25")


def test_one_line_is_drawn_for_all_seeds_of_an_arm():
    page = html(results_of(*seeded(NONE, [90.0, 60.0]), *seeded(VACCINE, [10.0, 20.0])))
    assert "<title>safety_defense none: 75.0 at 20</title>" in page
    assert "seed 1:" not in page.split("<figure>")[1].split("</figure>")[0]


def test_a_seventh_line_is_told_from_the_first():
    chart = line_chart([Series(str(n), [(0, n, None, None)], "") for n in range(7)], x_label="x", y_label="y")
    assert chart.count('"line s0"') == 1
    assert 'class="line s0 dashed"' in chart
    assert 'class="key s0 dashed"' in chart


def test_results_from_before_there_were_arms_can_be_shown():
    results = results_of(cell_of(NONE, 80.0))
    for entry in [*results["cells"], *results["summary"]]:
        for key in ("arm", "conditions", "defenses", "skipped"):
            entry.pop(key, None)
    assert "safety_defense none" in markdown(results)
    assert "safety_defense none" in html(results)


def test_a_failed_cell_is_in_the_report():
    failed = copy.deepcopy(cell_of(VACCINE, 0.0)) | {
        "status": "failed", "problems": ["align: exit code 1"], "models": {}, "curve": [], "samples": {},
    }  # fmt: skip
    results = results_of(cell_of(NONE, 80.0), failed)
    assert "failed: align: exit code 1" in html(results)
    assert "safety_defense vaccine: FAILED. align: exit code 1" in markdown(results)


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
    assert 'points="48.0,224.0 628.0,12.0"' in chart


def test_reporting_again_gives_the_same_pages(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results_of(cell_of(NONE, 80.0))))
    for _ in range(2):
        result = CliRunner().invoke(tvac, ["report", str(tmp_path)])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "report.md").is_file()


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"summary": [{"models": []}]}', "[" * 100_000])
def test_unreadable_results_are_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    result = CliRunner().invoke(tvac, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "no readable results" in result.output
    assert not (tmp_path / "report.html").exists()
