"""What models answered, on disk: written when it is generated, and again with a judge's verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import write_text
from tvac_plugin.data.jsonl import json_rows
from tvac_plugin.evaluation.judges import Exchange, Verdict
from tvac_plugin.evaluation.prompts import Prompt
from tvac_plugin.evaluation.recipe import Accuracy, Retention
from tvac_plugin.evaluation.retention import RowLoss


def exchanges_of(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Exchange]:
    """Each prompt with its answer, and in the row its reference, and how it was asked where that was not plainly."""
    return [
        Exchange(prompt.text, answer, {**prompt.row, "reference": prompt.reference, _ASKED: prompt.facts})
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


_ASKED = "tvac_asked"


class AnswerFiles:
    """One JSONL file for each model and measure."""

    def __init__(self, folder: Path) -> None:
        """Names the folder; it is made when something is written."""
        self._folder = folder

    def write(
        self,
        model: str,
        measure: str,
        exchanges: Sequence[Exchange],
        verdicts: Sequence[Verdict] | None = None,
        second: Sequence[Verdict] | None = None,
    ) -> None:
        """Writes one line per answer, with what the judge and the second judge said, as far as they have."""
        first = [{}] * len(exchanges) if verdicts is None else [verdict._asdict() for verdict in verdicts]
        other = [{} for _ in exchanges] if second is None else [
            {"second_harmful": verdict.harmful, "second_refused": verdict.refused} for verdict in second
        ]  # fmt: skip
        self._write(model, measure, [
            {"prompt": e.prompt, **e.row[_ASKED], "answer": e.answer, "reference": e.row["reference"], **said, **more}
            for e, said, more in zip(exchanges, first, other, strict=True)
        ])  # fmt: skip

    def read(self, model: str, measure: str, prompts: Sequence[Prompt]) -> list[Exchange]:
        """Reads the answers to `prompts`.

        Raises:
            UserError: There are none, they are damaged, or they are to other prompts.
        """
        path, rows = self._read(model, measure)
        found = [(row.get("prompt"), {key: row[key] for key in ("asked", "prefill") if row.get(key)}) for row in rows]
        if found != [(prompt.text, prompt.facts) for prompt in prompts]:
            raise UserError(f"{path}: the answers are to other prompts. Run without --rejudge.")
        return exchanges_of(prompts, [row["answer"] for row in rows])

    def write_rate(self, model: str, measure: str, source: Accuracy, found: dict[str, Any]) -> None:
        """Writes what the evaluation harness found; its answers are its own."""
        self._write(model, measure, [{"asked": source.model_dump(), "found": found}])

    def read_rate(self, model: str, measure: str, source: Accuracy) -> dict[str, Any]:
        """Reads what the evaluation harness found.

        Raises:
            UserError: There is nothing, it is damaged, or the harness was asked something else.
        """
        path, rows = self._read(model, measure)
        if [row.get("asked") for row in rows] != [source.model_dump()]:
            raise UserError(f"{path}: the answers are to another task. Run without --rejudge.")
        return dict(rows[0]["found"])

    def write_losses(
        self, model: str, measure: str, source: Retention, prompts: Sequence[Prompt], losses: Sequence[RowLoss]
    ) -> None:
        """Writes one line per reference answer, with its losses and the model they are held against."""
        self._write(model, measure, [
            {"prompt": prompt.text, "reference": prompt.reference, "of": source.of, **row._asdict()}
            for prompt, row in zip(prompts, losses, strict=True)
        ])  # fmt: skip

    def read_losses(self, model: str, measure: str, source: Retention, prompts: Sequence[Prompt]) -> list[RowLoss]:
        """Reads the losses on the references of `prompts`.

        Raises:
            UserError: There are none, they are damaged, of other answers, or held against another model.
        """
        path, rows = self._read(model, measure)
        wanted = [(prompt.text, prompt.reference, source.of) for prompt in prompts]
        if [(row.get("prompt"), row.get("reference"), row.get("of")) for row in rows] != wanted:
            raise UserError(f"{path}: the losses are of other answers or another model. Run without --rejudge.")
        return [RowLoss(row["num_tokens"], row["loss"], row["base_loss"]) for row in rows]

    def _path(self, model: str, measure: str) -> Path:
        return self._folder / f"{model}.{measure}.jsonl"

    def _write(self, model: str, measure: str, rows: Sequence[dict[str, Any]]) -> None:
        write_text(self._path(model, measure), "".join(json.dumps(row) + "\n" for row in rows))

    def _read(self, model: str, measure: str) -> tuple[Path, list[dict[str, Any]]]:
        path = self._path(model, measure)
        if not path.is_file():
            raise UserError(f"{path}: no answers to judge again. Run without --rejudge first.")
        try:
            return path, [row.value for row in json_rows(path)]
        except UserError as error:
            raise UserError(f"{path}, {error} Or run without --rejudge.") from error
