"""The report shows results.json and nothing else, and model output cannot harm it."""

from __future__ import annotations

import copy
import json

import pytest
from click.testing import CliRunner

from tvac_plugin.chain.results import summarise
from tvac_plugin.cli import tvac
from tvac_plugin.report.charts import Series, heat_map, line_chart
from tvac_plugin.report.pages import html, markdown

EVIL = '<script>alert("x")</script>'


def rated(percent, *, judge="exact", prompts="p"):
    return {
        "percent": percent, "low": max(0.0, percent - 5), "high": min(100.0, percent + 5), "num_scored": 60,
        "num_unscored": 2, "judge": judge, "judge_note": "note", "prompts_sha256": prompts,
    }  # fmt: skip


def cell_of(params, percent, **options):
    return {
        "params": params, "status": "finished", "problems": [], "jobs": {}, "attack_cost": 20,
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


@pytest.mark.parametrize("content", [None, "", "{}", "[]"])
def test_unreadable_results_are_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    result = CliRunner().invoke(tvac, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "no readable results" in result.output
    assert not (tmp_path / "report.html").exists()
