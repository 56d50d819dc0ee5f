from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from tests.bench.conftest import TINY
from tests.support.full_disk import full_disk
from tvac_plugin.bench import run as bench_run
from tvac_plugin.bench.baseline import comparison_problem, regressions, write_baseline
from tvac_plugin.bench.cases import OFF, PLAIN
from tvac_plugin.bench.plot import bench_page
from tvac_plugin.bench.results import read_results
from tvac_plugin.bench.tables import bench_text
from tvac_plugin.cli import tvac

OPTIONS = [
    "bench", "--layers", "3", "--width", "64", "--sequence", "8", "--batch", "2", "--drawn-layers", "1",
    "--vocabulary", "64", "--threads", "1", "--draws", "3", "--defense", "t_vaccine", "--defense", "vaccine",
]  # fmt: skip


@pytest.fixture
def command(results, monkeypatch):
    """The command, with a benchmark that was taken before instead of a new one."""
    taken = results.model_copy(
        update={
            "runs": [
                run.model_copy(update={"shape": run.shape.model_copy(update={"lora_rank": 8})}) for run in results.runs
            ]
        }
    )
    monkeypatch.setattr(bench_run, "benchmark", lambda *_, **__: taken)
    return lambda *extra: CliRunner().invoke(tvac, [*OPTIONS, *map(str, extra)])


@pytest.fixture
def stored(results, tmp_path):
    """Writes a baseline, changed by a function of its cases."""

    def write(change=lambda cases: None):
        path = tmp_path / "baseline.json"
        write_baseline(results, path)
        document = json.loads(path.read_text())
        change(document["runs"][0]["cases"])
        path.write_text(json.dumps(document))
        return path

    return write


def test_the_table_puts_sft_first_and_says_how_it_was_measured(results):
    lines = bench_text(results).splitlines()
    assert lines[0].split("  ")[0] == ""
    assert [line.split("  ")[0] for line in lines[1:5]] == [PLAIN, OFF, "t_vaccine", "vaccine"]
    assert lines[1].split()[1] == "1.00"
    text = bench_text(results)
    assert "with SFTTrainer's own metrics" in text
    assert "mean over 3 draws of 1 layers" in text
    assert "and 1.00 in the uniform distribution" in text, "of layers 0, 1 and 2"
    assert f"{OFF}: loss and gradients are SFT's bit for bit" in text
    ours = {name: case for name, case in results.main.cases.items() if name in ("t_vaccine", "vaccine")}
    sft = results.main.cases[PLAIN].mean("flops")
    floors = [f"{name} {case.mean('flops') / sft:.2f} and {case.time_ratio:.2f}" for name, case in ours.items()]
    assert f"on this shape: {', '.join(floors)}." in text


def test_the_markdown_table_has_the_same_cells(results):
    table = [line for line in bench_text(results, markdown=True).splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1


def test_growth_is_shown_against_the_main_run(results):
    longer = results.main.model_copy(
        update={"shape": TINY.model_copy(update={"sequence_len": 16}), "varied": "sequence_len"}
    )
    grown = results.model_copy(update={"runs": [results.main, longer]})
    rows = [line for line in bench_text(grown).splitlines() if line.startswith("sequence")]
    assert [row.split()[1:4] for row in rows] == [["8", "1.00", "1.00"], ["16", "1.00", "1.00"]]
    page = bench_page(grown)
    assert "<h2>time against sequence</h2>" in page
    assert page.count("<polyline") == 3 * 2, "three measures of two defenses"
    assert "<polyline" not in bench_page(results)


def test_results_are_written_and_agree_with_themselves(command, tmp_path):
    result = command("--output", tmp_path / "out", "--write-baseline", tmp_path / "new" / "baseline.json")
    assert result.exit_code == 0, result.output
    written = read_results(tmp_path / "out" / "bench.json")
    assert written.main.cases["vaccine"].seconds
    assert "<svg" in (tmp_path / "out" / "bench.html").read_text()
    baseline = read_results(tmp_path / "new" / "baseline.json")
    assert not any(case.seconds for case in baseline.main.cases.values())
    result = command("--baseline", tmp_path / "new" / "baseline.json", "--tolerance", 0)
    assert result.exit_code == 0, result.output


def test_a_full_disk_leaves_the_page_before(command, tmp_path, monkeypatch):
    monkeypatch.setattr("tvac_plugin.boundary.files.write_json", lambda *_: None)
    page = tmp_path / "bench.html"
    page.write_text("good")
    with full_disk():
        result = command("--output", tmp_path)
    assert f"{page}: File too large. Make room" in result.output
    assert page.read_text() == "good"


@pytest.mark.parametrize(
    ("count", "words"),
    [
        ("saved_bytes", "saved bytes"), ("flops", "FLOPs"), ("layer_forwards", "decoder layers run"),
        ("layer_backwards", "decoder layers differentiated"),
    ],
)  # fmt: skip
def test_a_count_that_grew_by_one_is_a_regression(results, stored, count, words):
    def shrink(cases):
        cases["t_vaccine"]["draws"][1][count] -= 1

    (found,) = regressions(results, read_results(stored(shrink)))
    assert found.startswith(f"t_vaccine: {words}: ")
    assert f"with layers {results.main.cases['t_vaccine'].draws[1].layers}: more." in found


def test_a_count_that_fell_asks_for_a_new_baseline(results, stored):
    def grow(cases):
        cases["vaccine"]["draws"][0]["flops"] += 1

    (found,) = regressions(results, read_results(stored(grow)))
    assert "less; if that is meant, write a new baseline" in found


def test_a_time_is_a_regression_beyond_the_tolerance_only(results, stored):
    def faster(cases):
        cases["vaccine"]["time_ratio"] = results.main.cases["vaccine"].time_ratio / 1.09

    baseline = read_results(stored(faster))
    assert regressions(results, baseline, tolerance_percent=10) == []
    (found,) = regressions(results, baseline, tolerance_percent=8)
    assert found.startswith("vaccine: time ")


def test_a_plugin_that_is_no_longer_sft_is_a_regression(results, stored):
    cases = results.main.cases
    changed = cases | {OFF: cases[OFF].model_copy(update={"same_as_sft": False})}
    now = results.model_copy(update={"runs": [results.main.model_copy(update={"cases": changed})]})
    assert regressions(now, read_results(stored())) == [f"{OFF}: no longer SFT bit for bit."]


def test_another_version_is_named_beside_a_regression_but_is_none(results, stored):
    older = results.model_copy(update={"versions": {**results.versions, "torch": "1.0"}})
    assert regressions(older, read_results(stored())) == []
    shrunk = read_results(stored(lambda cases: cases["vaccine"]["draws"][0].update(flops=1)))
    assert "torch was" in regressions(older, shrunk)[-1]


def test_the_command_fails_on_a_doctored_baseline(command, stored):
    def doctor(cases):
        cases["vaccine"]["draws"][0]["saved_bytes"] = 1

    path = stored(doctor)
    document = json.loads(path.read_text())
    document["runs"][0]["shape"]["lora_rank"] = 8
    path.write_text(json.dumps(document))
    result = command("--baseline", path)
    assert result.exit_code == 1
    assert "- vaccine: saved bytes: 1 before" in result.output
    assert "x SFT" in result.output, "the table is shown all the same"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--defense", "t_vacine"], "`t_vacine` is not a defense. Did you mean `t_vaccine`?"),
        (["--defense", "lisa"], "lisa defends while a user fine-tunes"),
        (["--drawn-layers", "4"], "4 drawn layers are more than the model's 3. Draw 3 or fewer"),
        (["--width", "100"], "a width of 100 is not a multiple of 64, an attention head's. Take 128"),
        (["--layers", "0"], "'--layers'"),
        (["--set", "t_vaccine.rho"], "write DEFENSE.KEY=VALUE"),
        (["--set", "sft.rho=1"], "`sft` is not measured"),
        (["--set", "t_vaccine.roh=1"], "unknown key `roh`. Did you mean `rho`?"),
        (["--baseline", "gone.json"], "gone.json: cannot be read. Name a file that `axolotl tvac bench` wrote."),
    ],
)
def test_mistakes_are_answered_before_anything_is_measured(monkeypatch, options, message):
    monkeypatch.setattr(bench_run, "benchmark", lambda *_, **__: pytest.fail("it was measured"))
    result = CliRunner().invoke(tvac, [*OPTIONS, *options])
    assert result.exit_code != 0
    assert message in result.output


def test_a_baseline_of_something_else_is_refused(monkeypatch, stored, tmp_path):
    monkeypatch.setattr(bench_run, "benchmark", lambda *_, **__: pytest.fail("it was measured"))
    path = stored()
    for options, message in (([], "lora_rank 2 and not 8"), (["--sequence", "16"], "sequence_len 8 and not 16")):
        result = CliRunner().invoke(tvac, [*OPTIONS, *options, "--baseline", str(path)])
        assert result.exit_code == 1
        assert message in result.output
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"format": 1}')
    result = CliRunner().invoke(tvac, [*OPTIONS, "--baseline", str(damaged)])
    assert f"{damaged}: not the results of a benchmark" in result.output


def test_a_missing_gpu_is_said(results, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(tvac, [*OPTIONS, "--device", "cuda"])
    assert result.exit_code == 1
    assert "no CUDA GPU can be used here" in result.output


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("[0.5, 0.5]", (), "has probabilities of 2 layers, and the model has 3"),
        ("[0.5, 0.3, 0.2]", ("--scale",), "--scale varies it. Leave one of them out"),
        ("[0.5, 0.3, 0.2]", ("--set", "t_vaccine.layer_sampling=top_k"), "Leave out `--set t_vaccine.layer_sampling`"),
    ],
)
def test_draws_that_cannot_be_measured_are_refused(command, tmp_path, content, more, message):
    trace = tmp_path / "t.json"
    trace.write_text(content)
    result = command("--draws-from", trace, *more)
    assert result.exit_code == 1
    assert message in result.output


def test_a_baseline_of_other_draws_is_not_compared(results):
    settings = results.settings.model_copy(update={"probabilities": [0.5, 0.3, 0.2]})
    assert "taken with probabilities None, this is with [0.5, 0.3, 0.2]" in comparison_problem(results, TINY, settings)
