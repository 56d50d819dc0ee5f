"""Results of a benchmark as tables, plain or in Markdown, ratios to SFT first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from tvac_plugin.bench.cases import OFF, PLAIN
from tvac_plugin.bench.results import CaseResult, Results, Run
from tvac_plugin.defenses.layer_draws import lowest_layer_shares
from tvac_plugin.report.tables import text_table

SIZES = {
    "num_layers": "layers",
    "hidden_size": "width",
    "sequence_len": "sequence",
    "num_active_layers": "drawn layers",
}
"""What `--scale` varies, in words."""

_HEADER = [
    "", "time x SFT", "quartiles", "saved x SFT", "FLOPs x SFT", "memory x SFT", "forward", "backward", "saved MB",
    "peak MB",
]  # fmt: skip
_QUIET_LOAD = 0.5


def bench_text(results: Results, *, markdown: bool = False) -> str:
    """The table, where it was taken, what its columns mean, and how cost grows if that was measured."""
    table = _markdown if markdown else text_table
    parts = [table(_HEADER, case_rows(results.main)), "\n".join(_notes(results, bullet="- " if markdown else ""))]
    if len(results.runs) > 1:
        names = [name for name in results.main.cases if name not in (PLAIN, OFF)]
        header = ["", "", "SFT FLOPs", "SFT saved", *(f"{name}: time, saved" for name in names)]
        parts.append(table(header, _scale_rows(results, names)))
        parts.append("SFT against SFT of the first table; every other column against SFT of the same shape.")
    return "\n\n".join(parts)


def case_rows(run: Run) -> list[list[str]]:
    """One row per case."""
    sft = run.cases[PLAIN]
    rows = []
    for name, case in run.cases.items():
        quartiles = "-" if case.time_low is None else f"{case.time_low:.2f} to {case.time_high:.2f}"
        ratios = [case.mean(count) / sft.mean(count) if sft.mean(count) else math.nan for count in _RATIOS]
        passes = [case.mean(count) / run.shape.num_layers for count in ("layer_forwards", "layer_backwards")]
        megabytes = [case.mean(count) / 1e6 for count in ("saved_bytes", "peak_bytes")]
        numbers = [*(_number(value, 2) for value in [*ratios, *passes]), *(_number(value, 1) for value in megabytes)]
        rows.append([name, _number(case.time_ratio, 2), quartiles, *numbers])
    return rows


_RATIOS = ("saved_bytes", "flops", "rise_bytes")


def describe(results: Results) -> list[str]:
    """The shape and the machine, one sentence each."""
    shape, where = results.main.shape, results.machine
    sft = results.main.cases[PLAIN].seconds
    seconds = f"; one SFT step took {median(t for row in sft for t in row):.3f} s" if sft else ""
    packages = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return [
        f"Model: Llama, {shape.num_layers} layers, width {shape.hidden_size}, vocabulary {shape.vocabulary_size}, "
        f"{shape.dtype}, {shape.attention} attention, LoRA rank {shape.lora_rank} on all linear modules; "
        f"batch {shape.batch_size} x {shape.sequence_len} tokens, half of each row answer; loss {shape.loss_type}, "
        f"with{'' if results.settings.host_metrics else 'out'} SFTTrainer's own metrics.",
        f"Machine: {where.get('accelerator') or where['processor']}, {where['cores']} cores, "
        f"{results.settings.threads} threads{seconds}; {packages}.",
    ]


def _notes(results: Results, *, bullet: str) -> list[str]:
    settings = results.settings
    memory = "the CUDA allocator's" if results.main.shape.device == "cuda" else "the process's resident memory"
    notes = [
        *describe(results),
        f"Time: {settings.repeats} rounds in turns after {settings.warmup} to warm up; the median, and the rounds' "
        "quartiles."
        if settings.repeats
        else "Nothing was timed.",
        "Saved: most bytes that the autograd graphs alive at one time hold, each storage once, parameters and buffers "
        "left out.",
        f"Memory: {memory}; the ratio is of the rise within the step, the peak is absolute.",
        "Forward and backward: decoder layers run and differentiated, in passes of the whole model.",
        _floor_note(results.main),
        *_draw_notes(results),
    ]
    tar = results.main.cases["tar"].settings if "tar" in results.main.cases else None
    if tar is not None and "inner_steps" not in settings.changes.get("tar", {}):
        notes.append(f"tar: {tar['inner_steps']} inner steps; the default, 64, costs in proportion.")
    same = results.main.cases[OFF].same_as_sft if OFF in results.main.cases else None
    if same is not None:
        notes.append(f"{OFF}: loss and gradients are {'' if same else 'NOT '}SFT's bit for bit.")
    if settings.repeats and results.machine.get("load_before", 0) > _QUIET_LOAD:
        notes.append(
            f"The machine was busy before this began (load {results.machine['load_before']}): times are rough."
        )
    return [bullet + note for note in notes]


def _floor_note(run: Run) -> str:
    """What each defense cannot be cheaper than, beside what it took."""
    sft = run.cases[PLAIN].mean("flops")
    both = [
        f"{name} {_number(case.mean('flops') / sft, 2)} and {_number(case.time_ratio, 2)}"
        for name, case in run.cases.items()
        if case.settings is not None
    ]
    return f"Floor, the products alone, counted, and the measured time, x SFT, on this shape: {', '.join(both)}."


def _draw_notes(results: Results) -> list[str]:
    """Of each defense that draws layers: how well its draws stand for the distribution."""
    notes = []
    for name, case in results.main.cases.items():
        if case.draws[0].layers:
            lowest = fmean(min(draw.layers) for draw in case.draws)
            expected, which = _expected_lowest(results, case)
            notes.append(
                f"{name}: mean over {len(case.draws)} draws of {len(case.draws[0].layers)} layers. The lowest drawn "
                f"layer decides the cost; its mean is {lowest:.2f}, and {expected:.2f} in {which}. "
                f"Saved by draw: {_saved_range(case, results)} x SFT."
            )
    return notes


def _expected_lowest(results: Results, case: CaseResult) -> tuple[float, str]:
    """The mean of the lowest drawn layer, and of which distribution."""
    shape, probabilities = results.main.shape, results.settings.probabilities
    probes = [] if probabilities is None else [probabilities]
    sampling = (case.settings or {}).get("layer_sampling", "top_k")
    shares = lowest_layer_shares(shape.num_layers, shape.num_active_layers, sampling, probes=probes)
    expected = sum(layer * share for layer, share in shares.items())
    return expected, "that of --draws-from" if probes else "the uniform distribution"


def _saved_range(case: CaseResult, results: Results) -> str:
    saved = [draw.saved_bytes / results.main.cases[PLAIN].mean("saved_bytes") for draw in case.draws]
    return f"{min(saved):.2f} to {max(saved):.2f}"


def _scale_rows(results: Results, names: Sequence[str]) -> list[list[str]]:
    base = results.main.cases[PLAIN]
    rows = []
    for size, words in SIZES.items():
        for run in sorted(runs_of(results, size), key=lambda run: int(getattr(run.shape, size))):
            sft = run.cases[PLAIN]
            growth = [_number(sft.mean(count) / base.mean(count), 2) for count in ("flops", "saved_bytes")]
            cells = [
                f"{_number(run.cases[name].time_ratio, 2)}, "
                f"{_number(run.cases[name].mean('saved_bytes') / sft.mean('saved_bytes'), 2)}"
                for name in names
            ]
            rows.append([words, str(getattr(run.shape, size)), *growth, *cells])
    return rows


def runs_of(results: Results, size: str) -> list[Run]:
    """The runs in which `size` is varied, with the main one; none if it was not."""
    varied = [run for run in results.runs if run.varied == size]
    return [results.main, *varied] if varied else []


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
