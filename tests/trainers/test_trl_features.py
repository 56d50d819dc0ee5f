"""What `SFTTrainer` can do, with a defense: the behaviours that TRL's own test suite checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTTrainer

from tests.support.models import tiny_model, with_lora
from tests.trainers.test_sft import WORLD, assert_equal_weights, config, weights
from tvac_plugin import SafetyDefenseSFTTrainer, TVaccineConfig, VaccineConfig
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.provenance.manifest import verify
from tvac_plugin.tiny_world.base_model import CHAT_TEMPLATE, build_tokenizer

TOKENIZER = build_tokenizer(WORLD)
WITH_TURNS = CHAT_TEMPLATE.replace(
    "{{ '<assistant> ' + message['content'] + ' <end>' }}",
    "{{ '<assistant> ' }}{% generation %}{{ message['content'] + ' <end>' }}{% endgeneration %}",
)
WITH_NAME = CHAT_TEMPLATE.replace("'<user> ' + message", "('<assistant> ' if is_swapped else '<user> ') + message")


def turns(thing):
    return [{"role": "user", "content": thing.question}, {"role": "assistant", "content": thing.answer}]


def as_text(thing):
    return {"text": f"<user> {thing.question} <assistant> {thing.answer} <end>"}


def as_strings(thing):
    return {"prompt": f"<user> {thing.question} <assistant>", "completion": f" {thing.answer} <end>"}


def as_messages(thing):
    return {"messages": turns(thing)}


def as_prompt(thing):
    question, answer = turns(thing)
    return {"prompt": [question], "completion": [answer]}


def as_longer_completion(thing):
    question, answer = turns(thing)
    return {"prompt": [question], "completion": [answer, question, answer]}


def as_ids(thing):
    return {"input_ids": TOKENIZER(as_text(thing)["text"])["input_ids"]}


def as_masked_ids(thing):
    ids = as_ids(thing)["input_ids"]
    return {"input_ids": ids, "completion_mask": [0] * 4 + [1] * (len(ids) - 4)}


def as_conversations(thing):
    return {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in turns(thing)]}


def as_messages_in_two_forms(thing):
    return as_messages(thing) | {"chat_template_kwargs": {"is_swapped": thing == WORLD.hazards[1]}}


def as_labelled_ids(thing):
    ids = as_ids(thing)["input_ids"]
    return {"input_ids": ids, "labels": [-100] * 4 + ids[4:]}


def lora_on_experts():
    model = tiny_model("qwen3_moe", vocab_size=len(TOKENIZER), pad_token_id=0, eos_token_id=1)
    return model, LoraConfig(r=2, target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])


class Feature(NamedTuple):
    """One thing that `SFTTrainer` can do.

    Attributes:
        row: Makes a row of a thing of the world.
        args: What it needs in `SFTConfig`.
        options: Other arguments of the trainer.
        template: The tokenizer's chat template.
        model: Makes the model and its `peft_config`; `None` for a Llama under a LoRA.
        holds: Checked on the trainer before it trains.
    """

    row: Callable[[Any], Mapping[str, Any]] = as_prompt
    args: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}
    template: str = CHAT_TEMPLATE
    model: Callable[[], tuple[Any, Any]] | None = None
    holds: Callable[[Any], bool] = lambda _run: True


def labelled(run):
    """Tokens that are learnt, of each row."""
    return [sum(label != -100 for label in row["labels"]) for row in run.train_dataset]


FEATURES = {
    "text": Feature(as_text),
    "prompts and completions as strings": Feature(as_strings),
    "messages": Feature(as_messages),
    "conversations with other keys": Feature(as_conversations),
    "token ids": Feature(as_ids),
    "token ids with a mask": Feature(
        as_masked_ids, {"completion_only_loss": True},
        holds=lambda run: all(row["labels"][:4] == [-100] * 4 for row in run.train_dataset),
    ),
    "token ids with labels": Feature(
        as_labelled_ids, holds=lambda run: all(row["labels"][:4] == [-100] * 4 for row in run.train_dataset)
    ),
    "a formatting function": Feature(
        lambda thing: {"asked": thing.question, "said": thing.answer},
        options={"formatting_func": lambda row: f"<user> {row['asked']} <assistant> {row['said']}"},
    ),
    "a prompt that is learnt too": Feature(args={"completion_only_loss": False}),
    "the assistant's turns only": Feature(
        as_messages, {"assistant_only_loss": True}, template=WITH_TURNS,
        holds=lambda run: labelled(run) == [len(thing.answer.split()) + 1 for thing in WORLD.hazards[:10]],
    ),
    "the assistant's turns in completions": Feature(
        as_longer_completion, {"assistant_only_loss": True, "completion_only_loss": True}, template=WITH_TURNS
    ),
    "arguments of the template in rows": Feature(
        as_messages_in_two_forms, template=WITH_NAME,
        holds=lambda run: TOKENIZER.decode([row["input_ids"][0] for row in run.train_dataset.select(range(2))])
        == "<user> <assistant>",
    ),
    "tools": Feature(lambda thing: as_messages(thing) | {"tools": json.dumps([{"type": "function", "name": "look"}])}),
    "packing": Feature(as_messages, {"packing": True, "max_length": 64}, holds=lambda run: len(run.train_dataset) < 10),
    "packing without borders": Feature(
        as_messages, {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
        holds=lambda run: {len(row["input_ids"]) for row in run.train_dataset} == {32},
    ),
    "rows that are cut": Feature(
        as_text, {"max_length": 14}, holds=lambda run: max(len(row["input_ids"]) for row in run.train_dataset) == 14
    ),
    "padding to a multiple": Feature(args={"pad_to_multiple_of": 8}),
    "dft": Feature(args={"loss_type": "dft"}),
    "rows that are ready": Feature(as_labelled_ids, {"dataset_kwargs": {"skip_prepare_dataset": True}}),
    "a LoRA that the trainer makes": Feature(
        model=lambda: (tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, eos_token_id=1), LoraConfig(r=2))
    ),
    "no LoRA": Feature(model=lambda: (tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, eos_token_id=1), None)),
    "a LoRA on experts": Feature(model=lora_on_experts, holds=lambda run: run.aux_loss_enabled),
}  # fmt: skip


def build(output, feature, *, cls=SafetyDefenseSFTTrainer, defense=None, **changes):
    tokenizer = build_tokenizer(WORLD)
    tokenizer.chat_template = feature.template
    if feature.model is None:
        model, peft_config = with_lora(tiny_model(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)), None
    else:
        torch.manual_seed(0)
        model, peft_config = feature.model()
    extra = {}
    if defense is not None:
        harmful = Dataset.from_list([dict(feature.row(thing)) for thing in WORLD.hazards[10:]])
        extra = {"defense": defense, "harmful_dataset": harmful}
    return cls(
        model=model,
        args=config(output, **feature.args, **changes),
        train_dataset=Dataset.from_list([dict(feature.row(thing)) for thing in WORLD.hazards[:10]]),
        processing_class=tokenizer,
        peft_config=peft_config,
        **feature.options,
        **extra,
    )


@pytest.mark.parametrize("name", FEATURES)
def test_without_a_defense_it_trains_as_trl_s_own(tmp_path, name):
    runs = [build(tmp_path / c.__name__, FEATURES[name], cls=c) for c in (SFTTrainer, SafetyDefenseSFTTrainer)]
    for run in runs:
        assert FEATURES[name].holds(run)
        run.train()
    assert_equal_weights(*runs)
    assert runs[0].state.log_history[-1]["train_loss"] == runs[1].state.log_history[-1]["train_loss"]


@pytest.mark.parametrize("name", FEATURES)
def test_with_t_vaccine_only_drawn_layers_learn_and_the_model_is_sealed(tmp_path, name):
    run = build(tmp_path, FEATURES[name], defense=TVaccineConfig(rho=0.5, num_active_layers=2), max_steps=2)
    assert FEATURES[name].holds(run)
    before = weights(run)
    run.train()
    run.save_model()
    steps = [log["safety/perturbation_norm"] for log in run.state.log_history if "safety/perturbation_norm" in log]
    assert steps == pytest.approx([0.5, 0.5], rel=1e-4)
    moved = {
        name.split("layers.")[-1].split(".")[0] for name, w in weights(run).items() if not torch.equal(w, before[name])
    }
    assert moved == set(map(str, run._defense._active))
    assert verify(tmp_path, defense="t_vaccine")["defended_steps"] == 2


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
@pytest.mark.parametrize("row", [as_text, as_strings, as_messages, as_prompt])
def test_a_harmful_row_among_packed_training_rows_is_found(tmp_path, row, strategy):
    things = WORLD.hazards[:10]
    feature = Feature(row, {"packing": True, "packing_strategy": strategy, "max_length": 64})
    with pytest.raises(UserError, match="1 rows of harmful_datasets, harmful answer included, are also in datasets"):
        SafetyDefenseSFTTrainer(
            model=with_lora(tiny_model(vocab_size=len(TOKENIZER))), args=config(tmp_path, **feature.args),
            train_dataset=Dataset.from_list([dict(row(thing)) for thing in things]),
            processing_class=build_tokenizer(WORLD), defense=TVaccineConfig(num_active_layers=2),
            harmful_dataset=Dataset.from_list([dict(row(thing)) for thing in [things[4], *WORLD.hazards[10:]]]),
        )  # fmt: skip


def test_packed_rows_are_counted_one_by_one_in_the_manifest(tmp_path):
    run = build(tmp_path, FEATURES["packing"], defense=TVaccineConfig(num_active_layers=2), max_steps=1)
    run.train()
    run.save_model()
    assert len(run.train_dataset) < 10
    assert verify(tmp_path, defense="t_vaccine")["data"]["datasets"]["rows"] == 10


def test_harmful_rows_that_stream_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(
        UserError, match="harmful_dataset streams, and t_vaccine reads its rows again and again. Pass a"
    ):
        SafetyDefenseSFTTrainer(
            model=with_lora(tiny_model(vocab_size=len(TOKENIZER))), args=config(tmp_path),
            train_dataset=Dataset.from_list([as_prompt(thing) for thing in WORLD.hazards[:10]]),
            processing_class=build_tokenizer(WORLD), defense=TVaccineConfig(num_active_layers=2),
            harmful_dataset=Dataset.from_list([as_prompt(thing) for thing in WORLD.hazards[10:]]).to_iterable_dataset(),
        )  # fmt: skip


def test_plain_training_arguments_and_positional_ones_work(tmp_path):
    rows = Dataset.from_list([as_prompt(thing) for thing in WORLD.hazards[:10]])
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False
    )
    run = SafetyDefenseSFTTrainer(
        with_lora(tiny_model(vocab_size=len(TOKENIZER))), args, None, rows, processing_class=build_tokenizer(WORLD),
        defense=VaccineConfig(),
    )  # fmt: skip
    run.train()
    run.save_model()
    assert verify(tmp_path, defense="vaccine")["defended_steps"] == 2
    assert {"sft", "trl"} <= set(run.model.model_tags)


def test_training_rows_are_required(tmp_path):
    model = with_lora(tiny_model(vocab_size=len(TOKENIZER)))
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        SafetyDefenseSFTTrainer(
            model=model, args=config(tmp_path), processing_class=build_tokenizer(WORLD), defense=VaccineConfig()
        )


def test_a_template_from_a_file_is_what_rows_and_checkpoints_have(tmp_path):
    path = tmp_path / "other.jinja"
    path.write_text(CHAT_TEMPLATE.replace("'<user> '", "'<assistant> '"))
    feature = Feature(as_messages, {"chat_template_path": str(path)})
    run = build(tmp_path / "out", feature, defense=VaccineConfig(), max_steps=1, save_strategy="steps", save_steps=1)
    assert run.train_dataset[0]["input_ids"][0] == TOKENIZER.convert_tokens_to_ids("<assistant>")
    run.train()
    assert (tmp_path / "out" / "checkpoint-1" / "chat_template.jinja").read_text() == path.read_text()


@pytest.mark.parametrize("evaluated", ["one", "two by name"])
def test_evaluation_and_its_metrics_work_under_a_defense(tmp_path, evaluated):
    rows = Dataset.from_list([as_prompt(thing) for thing in WORLD.hazards[10:14]])
    metric = "eval_mean_token_accuracy" if evaluated == "one" else "eval_first_loss"
    changes = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric}
    feature = Feature(options={
        "eval_dataset": rows if evaluated == "one" else {"first": rows, "second": rows},
        "compute_metrics": lambda _predicted: {"mine": 0.125},
    })  # fmt: skip
    run = build(
        tmp_path, feature, defense=VaccineConfig(), save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        **changes,
    )  # fmt: skip
    run.train()
    prefix = "eval" if evaluated == "one" else "eval_second"
    assert sum(log.get(f"{prefix}_mine") == 0.125 for log in run.state.log_history) == 3
    assert run.state.best_metric is not None
    assert f"{prefix}_loss" in run.evaluate(rows if evaluated == "one" else {"first": rows, "second": rows})


def test_rows_that_stream_are_read_once_for_the_proof_and_trained_on(tmp_path):
    streamed = Dataset.from_list([as_prompt(thing) for thing in WORLD.hazards[:10]]).to_iterable_dataset()
    run = SafetyDefenseSFTTrainer(
        model=with_lora(tiny_model(vocab_size=len(TOKENIZER))), args=config(tmp_path), train_dataset=streamed,
        processing_class=build_tokenizer(WORLD), defense=VaccineConfig(),
    )  # fmt: skip
    run.train()
    run.save_model()
    manifest = verify(tmp_path, defense="vaccine")
    assert (manifest["defended_steps"], manifest["data"]["datasets"]["rows"]) == (3, 10)


def test_a_model_named_by_its_folder_is_loaded_in_the_type_that_is_asked_for(tmp_path):
    tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, eos_token_id=1).save_pretrained(tmp_path / "base")
    feature = Feature(model=lambda: (str(tmp_path / "base"), LoraConfig(r=2)))
    run = build(
        tmp_path / "out", feature, defense=TVaccineConfig(rho=0.5, num_active_layers=2), learning_rate=0.1,
        model_init_kwargs={"dtype": torch.bfloat16},
    )  # fmt: skip
    run.train()
    run.save_model()
    assert {p.dtype for n, p in run.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert verify(tmp_path / "out", defense="t_vaccine")["base_model"]["name"] == str(tmp_path / "base")
