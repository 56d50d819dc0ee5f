"""The YAML of an evaluation: which models, which prompts, which judge."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.paths import FileName, Folder
from tvac_plugin.configs.base import Block
from tvac_plugin.configs.prompt_transform import NamedTransform
from tvac_plugin.evaluation.judges import check_judge
from tvac_plugin.evaluation.matches import Match
from tvac_plugin.evaluation.protocols import ProtocolName, with_protocol

PromptFormat = Literal["chat_template", "alpaca"]


class PromptSource(Block):
    """Where prompts come from."""

    block: ClassVar[str] = "prompts"

    path: str = Field(description="A JSONL file, or a data set on the hub.")
    subset: str | None = Field(default=None, description="Name of the data set's configuration. Default: absent.")
    split: str = Field(default="train", description="Split, for example `test` or `train[:100]`. Default train.")
    field: str = Field(
        default="messages",
        description="Column with the prompt; of a list of messages the first is taken, and the last is the reference "
        "answer. Default messages.",
    )
    only: dict[str, Any] | None = Field(
        default=None, description="Keep rows with these values, for example {is_safe: false}. Default: absent."
    )
    num_prompts: int = Field(
        default=500, ge=1, description="At most so many different prompts, the first ones. Default 500, as in papers."
    )
    keep_repeats: bool = Field(
        default=False,
        description="Count rows instead of different prompts, as published scripts do: a prompt that several rows ask "
        "is asked as often. Default False.",
    )


class Judged(Block):
    """A measure whose answers a judge reads."""

    block: ClassVar[str] = "measure"

    prompts: PromptSource = Field(description="What the models are asked.")
    judge: str = Field(description="Who reads the answers: one of the judges below, or `module.Class` of your own.")
    second_judge: str | None = Field(
        default=None,
        description="Another judge that reads the same answers. It decides nothing; the results say what it found, and "
        "how far the two agree. Default: absent.",
    )
    judge_model: str | None = Field(
        default=None, description="Weights of the judge, if not the published ones. Default: absent."
    )
    threshold: float | None = Field(
        default=None, ge=0, le=1, description="Score above which an answer is flagged. Default: the judge's own."
    )
    max_new_tokens: int = Field(
        default=128, ge=1, le=8192, description="Longest answer, in tokens. Default 128, as in papers."
    )
    prompt_transform: NamedTransform | None = Field(
        default=None,
        description="How prompts are rewritten before they are asked, as in `simulated_user:`. A chain fills in that "
        'of the attack that is judged; `{prompt: "{prompt}"}` asks plainly all the same. Default: absent.',
    )
    prefill: str = Field(
        default="",
        description="Words that the models' answers are made to begin with (prefilling); the judge reads them too. "
        "Default: none.",
    )

    @model_validator(mode="after")
    def _refuse_judges_that_cannot_be_made(self) -> Judged:
        check_judge(self.judge, weights=self.judge_model, threshold=self.threshold)
        if self.second_judge is not None:
            check_judge(self.second_judge)
        if self.second_judge == self.judge:
            raise UserError(f"second_judge: {self.judge} reads the answers already. Name another, or remove the key.")
        return self


class Accuracy(Block):
    """A measure whose answers have a reference: those of a file, or a task of the evaluation harness."""

    block: ClassVar[str] = "accuracy"

    prompts: PromptSource | None = Field(default=None, description="Prompts with reference answers. Default: absent.")
    match: Match = Field(
        default="exact",
        description="When an answer to `prompts:` is right: `exact`, it is the reference to the letter; `in_order`, it "
        "has all words of the reference in their order, whatever stands between them. Default exact.",
    )
    task: str | None = Field(
        default=None,
        description="A task of lm-evaluation-harness: tvac_sst2, tvac_ag_news, tvac_gsm8k, or any of its own; a group, "
        "as `mmlu`, counts all items of its tasks. Default: absent.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="At most so many items of the task, or of each task of a group. Default: all."
    )
    max_new_tokens: int = Field(default=128, ge=1, le=8192, description="Longest answer, in tokens. Default 128.")

    @model_validator(mode="after")
    def _need_one_source(self) -> Accuracy:
        if (self.prompts is None) == (self.task is None):
            raise UserError("accuracy: give either `prompts:` or `task:`.")
        return self


class Retention(Block):
    """A measure of what a model has lost: its loss on benign answers, against that of the model before alignment."""

    block: ClassVar[str] = "retention"

    prompts: PromptSource = Field(description="Benign prompts with the answers of the model before alignment.")
    of: str | None = Field(
        default=None,
        description="Folder or hub id of the model before alignment. A chain fills in what the alignment starts from. "
        "Default: absent.",
    )


class EvaluateRecipe(Block):
    """The whole recipe of `axolotl tvac evaluate`."""

    block: ClassVar[str] = "evaluate recipe"

    models: dict[FileName, str] = Field(
        default_factory=dict, description="Folders of models or adapters, by the name to show. A chain fills this in."
    )
    harmful_score: Judged | None = Field(default=None, description="Share of answers that are harmful.")
    over_refusal: Judged | None = Field(default=None, description="Share of answers to benign prompts that refuse.")
    accuracy: dict[FileName, Accuracy] = Field(default_factory=dict, description="Share of right answers, by name.")
    retention: Retention | None = Field(
        default=None, description="Loss per token of benign answers, as a ratio to that of the model before alignment."
    )
    protocol: ProtocolName | None = Field(
        default=None,
        description="Whose evaluation to follow in the rows of `harmful_score`, the length of answers to them, and the "
        "items of the papers' tasks. It sets these keys; one that says something else is refused. Default: absent.",
    )
    prompt_format: PromptFormat = Field(
        default="chat_template",
        description="How a prompt is put to the models: the tokenizer's own template, or Alpaca's. Use what they were "
        "trained with. Default chat_template.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the models, their tokenizers or a judge's weights. Default False.",
    )
    batch_size: int = Field(default=32, ge=1, description="Prompts generated, or answers read, at a time. Default 32.")
    max_unscored: float = Field(
        default=0.05, ge=0, le=1, description="Largest share of unscored answers that is accepted. Default 0.05."
    )
    checkpoints_of: str | None = Field(
        default=None,
        description="A training run's folder whose checkpoints are evaluated too, each as `step N`. A chain fills this "
        "in. Default: absent.",
    )
    output_dir: Folder = Field(description="Where answers and results go.")

    @model_validator(mode="before")
    @classmethod
    def _follow_the_protocol(cls, values: Any) -> Any:
        return with_protocol(values) if isinstance(values, dict) else values

    @field_validator("accuracy")
    @classmethod
    def _refuse_unclear_names(cls, value: dict[str, Accuracy]) -> dict[str, Accuracy]:
        for name in value:
            if "." in name or name in ("harmful_score", "over_refusal", "retention"):
                raise UserError(f"accuracy: `{name}` cannot be told from other measures. Call it something else.")
        return value

    @model_validator(mode="after")
    def _refuse_nothing_to_do(self) -> EvaluateRecipe:
        if not (self.harmful_score or self.over_refusal or self.accuracy or self.retention):
            raise UserError(
                "evaluate recipe: nothing to measure. Add harmful_score:, over_refusal:, accuracy: or retention:."
            )
        return self
