"""Every way we know in which a model could be called defended and not be, and what catches it.

`docs/explanation/how-you-could-be-fooled.md` is written from the tables here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from trl import SFTTrainer

from tests.chain import fake
from tests.support.models import tiny_model
from tests.support.sft_runs import WORLD, build
from tests.support.workspace import PLUGIN, Workspace, axolotl_train
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.cli import tvac
from tvac_plugin.configs.base import DefenseConfig
from tvac_plugin.configs.collapse import CTRAPConfig, SEAMConfig
from tvac_plugin.configs.perturbation import TVaccineConfig, VaccineConfig
from tvac_plugin.configs.refusals import REFUSALS
from tvac_plugin.configs.unlearning import BoosterConfig, RepNoiseConfig
from tvac_plugin.defenses import Defense, StepReport
from tvac_plugin.provenance.manifest import MANIFEST_FILE, verify
from tvac_plugin.tiny_world.base_model import build_tokenizer

ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"
FULL = {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_dropout": None, "lora_target_modules": None}
NO_DEFENSE = {"safety_defense": None, "harmful_datasets": None, "retain_datasets": None, "t_vaccine": None}
KERNELS_OFF = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False)


class Scene:
    """What a user has: a recipe with data, a defended adapter, a defended full model, and undefended ones."""

    def __init__(self, workspace: Workspace, trained: dict[str, Path], here: Path) -> None:
        self.workspace, self.trained, self.here = workspace, trained, here
        self._before: dict[Path, bytes] = {}

    @property
    def base(self) -> Path:
        return self.workspace.root / "base"

    def recipe(self, **changes: Any) -> dict[str, Any]:
        others = {key: self.workspace.entries(name) for key, name in (
            ("refusal_datasets", "refusals"), ("retain_datasets", "retain"), ("alignment_datasets", "held_out"),
        )}  # fmt: skip
        return self.workspace.recipe(self.here / "out", **{**others, **changes})

    def copy(self, name: str) -> Path:
        """A folder of its own with a trained model in it."""
        return Path(shutil.copytree(self.trained[name], self.here / name))

    def edit(self, path: Path, content: bytes) -> None:
        """Changes a file that other tests need too; `restore` puts it back."""
        self._before[path] = path.read_bytes()
        path.write_bytes(content)

    def restore(self) -> None:
        for path, content in self._before.items():
            path.write_bytes(content)


class Way(NamedTuple):
    """One way to be fooled.

    Attributes:
        what: What is done, as the docs say it.
        act: Does it: returns the recipe to check, or the folder to verify, or trains.
        says: A part of the message, as a regular expression; of training without a manifest, of what it logs; of what
            was changed, of what is done with it.
    """

    what: str
    act: Callable[[Scene], Any]
    says: str


def recipe(**changes: Any) -> Callable[[Scene], dict[str, Any]]:
    """The recipe with these changes."""
    return lambda scene: scene.recipe(**changes)


def weak(defense: str, says: str = "nothing would be defended", **settings: Any) -> list[Way]:
    """A defense with its strengths at nothing, and at next to nothing."""
    keys = ", ".join(f"`{key}`" for key, value in settings.items() if value is ...)

    def act(value: float) -> Callable[[Scene], dict[str, Any]]:
        block = {key: value if setting is ... else setting for key, setting in settings.items()}
        return recipe(safety_defense=defense, **{defense: block})

    return [Way(f"`{defense}` with {keys} at {value}", act(float(value)), says) for value in ("0", "1e-30")]


def reason(key: str) -> str:
    """How the refusal of a key goes on, up to its first stop."""
    return re.split(r"[.,;:]", next(refusal.reason for refusal in REFUSALS if refusal.key == key))[0]


def among_training_rows(scene: Scene) -> dict[str, Any]:
    """Half of the harmful rows, answers included, among the rows that are to be refused, under another template."""
    pairs = [
        [message["content"] for message in json.loads(line)["messages"]]
        for line in (scene.workspace.root / "harmful.jsonl").read_text().splitlines()
    ]
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in pairs[:6]]
    (scene.here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return scene.recipe(datasets=[{"path": str(scene.here / "rows.jsonl"), "type": "alpaca"}])


TAUGHT = "6 rows of harmful_datasets, harmful answer included, are also in datasets"
CHECK = [
    *weak("t_vaccine", rho=...),
    *weak("vaccine", rho=...),
    *weak("oasis", rho=...),
    *weak("random_noise", rho=...),
    *weak("rep_noise", alpha=..., beta=...),
    *weak("tar", tamper_scale=...),
    *weak("tar", says="tar.dpo_beta: ", dpo_beta=...),
    *weak("booster", regularizer_scale=...),
    *weak("booster", says="booster.harmful_step_size", harmful_step_size=...),
    *weak("ctrap", collapse_scale=...),
    *weak("ctrap", says="ctrap.harmful_step_size", harmful_step_size=...),
    *weak("circuit_breaker", alpha=...),
    *weak("crl", harmful_scale=...),
    *weak("seam", unlearning_scale=..., self_destruct_scale=...),
    *weak("lisa", alignment_steps=0, rho=...),
    Way(
        "`lisa` without alignment steps, in its warm-up to the end",
        recipe(safety_defense="lisa", lisa={"alignment_steps": 0, "warmup_ratio": 1.0}),
        "nothing would be defended",
    ),
    Way(
        "`lisa` with one alignment step in ten million",
        recipe(safety_defense="lisa", lisa={"alignment_steps": 1, "user_steps": 10_000_000, "rho": 0.0}),
        "nothing would be defended",
    ),
    Way(
        "`tar` with two strengths whose product is next to nothing",
        recipe(safety_defense="tar", tar={"tamper_scale": 0.001, "dpo_beta": 0.1}),
        "tar.tamper_scale: 0.001 times tar.dpo_beta: 0.1: nothing would be defended",
    ),
    Way(
        "`booster` with two strengths whose product is next to nothing",
        recipe(safety_defense="booster", booster={"regularizer_scale": 0.005}),
        "booster.regularizer_scale: 0.005 times booster.harmful_step_size: 0.1: nothing would be defended",
    ),
    Way(
        "`ctrap` with a word for the collapse that is none of the tokenizer's",
        recipe(safety_defense="ctrap", ctrap={"collapse_token": "Kollaps"}),
        "ctrap.collapse_token: 'Kollaps' is not in the tokenizer's vocabulary, and it must be exactly one token",
    ),
    Way(
        "`tar` against an adversary that never moves",
        recipe(safety_defense="tar", tar={"adversary_learning_rates": [1e-30]}),
        "the adversary would not move",
    ),
    Way(
        "`circuit_breaker`, which compares a model with its adapter and without it, on one that has none",
        recipe(safety_defense="circuit_breaker", **FULL),
        "`adapter` must name one: circuit_breaker compares",
    ),
    Way("`max_grad_norm: 1e-30`", recipe(max_grad_norm=1e-30), "`max_grad_norm` clips gradients to next to nothing"),
    Way("`adam_epsilon: 1e10`", recipe(adam_epsilon=1e10), "`adam_epsilon` divides all updates"),
    Way("`learning_rate: 0`", recipe(learning_rate=0), "trains nothing"),
    Way("a negative `learning_rate`", recipe(learning_rate=-1e-3), "trains nothing"),
    Way("`lora_alpha: 0`", recipe(lora_alpha=0), "`lora_alpha` multiplies the adapter by nothing"),
    Way("`lora_dropout: 1`", recipe(lora_dropout=1.0), "`lora_dropout` drops all that the adapter could learn from"),
    Way("the plugin's name is misspelt", recipe(plugins=[PLUGIN.replace("fense", "fence")]), f"Write `{PLUGIN}`"),
    Way(
        "`safety_defense` is misspelt",
        recipe(safety_defense=None, safety_defence="t_vaccine"),
        "Did you mean `safety_defense:`",
    ),
    Way("the defense is misspelt", recipe(safety_defense="t_vacine"), "Did you mean `t_vaccine`"),
    Way("a key of its block is misspelt", recipe(t_vaccine={"roh": 3.0}), "t_vaccine: unknown key `roh`"),
    Way(
        "its block is empty, for its keys are indented wrongly",
        lambda scene: scene.recipe() | {"t_vaccine": None, "rho": 30.0},
        "`t_vaccine:` is empty",
    ),
    Way("a key of its block is at the top level", recipe(probe_steps=1), "`probe_steps:` is a key of `t_vaccine:`"),
    Way("its block is there and `safety_defense` is not", recipe(safety_defense=None), "nothing would be defended"),
    Way(
        "neither is there",
        recipe(**NO_DEFENSE, refusal_datasets=None, alignment_datasets=None),
        "no defense is asked for",
    ),
    Way("the data that it reads are missing", recipe(harmful_datasets=None), "t_vaccine needs harmful prompts"),
    Way("harmful answers are among `datasets`, under another `type`", among_training_rows, TAUGHT),
    Way("more layers are drawn than there are", recipe(t_vaccine={"num_active_layers": 5}), "Set it to 4 or less"),
    *(
        Way(f"`{key}: {value}`".lower(), recipe(**{key: value}), f"`{key}` {reason(key)}")
        for key, value in (
            ("rl", "dpo"), ("reward_model", True), ("deepspeed", "zero2.json"), ("fsdp_config", {"fsdp_version": 2}),
            ("torch_compile", True), ("relora", True), ("lisa_n_layers", 2), ("tiled_mlp", True), ("fp8", True),
        )
    ),
]  # fmt: skip


def axolotl(**changes: Any) -> Callable[[Scene], Path]:
    """`axolotl train`, with these changes."""
    return lambda scene: axolotl_train(scene.recipe(**changes))


class Nothing(DefenseConfig):
    """Settings of the defenses below, which do nothing."""

    norm: float | None = 0.0


class Idle(Defense):
    """Trains plainly, and reports one and the same norm, or none."""

    config_class = Nothing

    def __init__(self, config: Nothing, model: Any, *, seed: int) -> None:
        self.norm = config.norm

    def step(self, host: Any, batch: Any, position: Any) -> StepReport:
        norms = {} if self.norm is None else {"push": torch.tensor(self.norm)}
        return StepReport(loss=host.train(batch), norms=norms)


class NotANumber(Nothing):
    """Settings of the defense whose norm is no number; a recipe cannot say so."""


class Broken(Idle):
    """Its push is no number."""

    config_class = NotANumber

    def __init__(self, config: NotANumber, model: Any, *, seed: int) -> None:
        self.norm = float("nan")


def trl(defense: DefenseConfig | None, *, after: Callable[[Any], None] = lambda _: None, **changes: Any):
    """Training and saving with TRL; `after` is what is done to the trainer in between."""

    def act(scene: Scene) -> Path:
        run = build(scene.here / "out", defense, **{"max_steps": 2, "save_strategy": "no"} | changes)
        run.train()
        after(run)
        run.save_model()
        return scene.here / "out"

    return act


def in_bfloat16(defense: DefenseConfig) -> Callable[[Scene], Path]:
    """As `trl`, with weights in bfloat16."""

    def act(scene: Scene) -> Path:
        run = build(scene.here / "out", defense, max_steps=2, save_strategy="no")
        run.model.to(torch.bfloat16)
        for name, weight in run.model.named_parameters():
            weight.data *= 1e4 if name.endswith("o_proj.base_layer.weight") else 1  # as large as in a large model
        run.train()
        run.save_model()
        return scene.here / "out"

    return act


def all_in_bfloat16(defense: DefenseConfig, **changes: Any) -> Callable[[Scene], Path]:
    """As `trl`, with no adapter and all weights in bfloat16."""

    def act(scene: Scene) -> Path:
        model = tiny_model(vocab_size=len(build_tokenizer(WORLD)), pad_token_id=0, eos_token_id=1).to(torch.bfloat16)
        return trl(defense, model=model, **changes)(scene)

    return act


def silent(**lora: Any) -> Callable[[Scene], Any]:
    """A trainer for a LoRA that cannot do anything."""

    def act(scene: Scene) -> Any:
        tokens = len(build_tokenizer(WORLD))
        model = get_peft_model(tiny_model(vocab_size=tokens), LoraConfig(r=2, target_modules="all-linear", **lora))
        return build(scene.here / "out", VaccineConfig(), model=model)

    return act


def virtual(kind: type[PeftConfig], defense: DefenseConfig) -> Callable[[Scene], Any]:
    """A trainer for virtual tokens in front of a model that stays as it is."""

    def act(scene: Scene) -> Any:
        model = tiny_model(vocab_size=len(build_tokenizer(WORLD)))
        return build(
            scene.here / "out", defense, model=get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
        )

    return act


def untrained(scene: Scene) -> Path:
    """Saves at once."""
    build(scene.here / "out", VaccineConfig()).save_model()
    return scene.here / "out"


def train_on(run: Any) -> None:
    """Goes on without the defense, on the same model."""
    args = run.args
    args.max_steps = 1
    SFTTrainer(
        model=run.model, args=args, train_dataset=Dataset.from_list([{"text": "a b c"}] * 4),
        processing_class=run.processing_class,
    ).train()  # fmt: skip


def merged(run: Any) -> None:
    """Folds the adapter into the base model, which is then no longer what was looked at."""
    run.model = run.model.merge_and_unload()


def cut_off(scene: Scene) -> Path:
    """A defended run that dies before its model is saved, in a folder with a defended model."""
    folder = scene.copy("defended")
    run = build(folder, VaccineConfig(), max_steps=1, save_strategy="no")
    run.train()
    return folder


def unsaved(scene: Scene) -> Path:
    """A defended run of Axolotl whose last save fails, in a folder with an undefended model."""
    folder = scene.copy("undefended")
    recipe = scene.recipe(output_dir=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("axolotl.train.save_trained_model", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            axolotl_train(recipe)
    PluginManager.get_instance().post_train_unload(DictDefault(recipe))
    return folder


UNMOVED = "none of .* trained tensors differs from what it was"
NOT_FINITE = "trained tensors hold values that are not finite"
AFTERWARDS = "the weights were changed after the training"
LOST = "zero, not finite or lost in rounding"
IDLE = "in 4 of 4 batches the defense did nothing"
DROPS_ALL = "drops all that the adapter could learn from"
HARMFUL = "needs harmful prompts with harmful answers"

TRAIN = [
    Way(
        "T-Vaccine with `lora_target_modules: [lm_head]`",
        axolotl(lora_target_modules=["lm_head"]),
        "nothing learns in layers 0, 1, 2, 3",
    ),
    Way(
        "T-Vaccine with an adapter in the first layer only",
        axolotl(peft_layers_to_transform=[0]),
        "nothing learns in layers 1, 2, 3",
    ),
    Way(
        "T-Vaccine where only the embeddings are unfrozen",
        axolotl(**FULL, unfrozen_parameters=["model.embed_tokens.weight"]),
        "nothing learns in layers 0, 1, 2, 3",
    ),
    Way("a strength of 0, without a check before", axolotl(t_vaccine={"rho": 0.0}), "nothing would be defended"),
    Way("`torch_compile`, without a check before", axolotl(torch_compile=True), "ignores hooks that come and go"),
    Way(
        "harmful answers among `datasets`, without a check before",
        lambda scene: axolotl_train(among_training_rows(scene)),
        TAUGHT,
    ),
    Way("TRL with `lora_alpha=0`", silent(lora_alpha=0), "multiplies the adapter by nothing"),
    Way("TRL with `lora_dropout=1`", silent(lora_alpha=4, lora_dropout=1.0), DROPS_ALL),
    *(
        Way(
            f"TRL with {name} instead of an adapter in the layers, under `{defense.block}`",
            virtual(kind, defense),
            f"{said} learns virtual tokens and leaves every layer as it was",
        )
        for name, kind, said in (
            ("prompt tuning", PromptTuningConfig, "PROMPT_TUNING"),
            ("prefix tuning", PrefixTuningConfig, "PREFIX_TUNING"),
            ("p-tuning", PromptEncoderConfig, "P_TUNING"),
        )
        for defense in (TVaccineConfig(num_active_layers=2), VaccineConfig(), RepNoiseConfig())
    ),
    Way("TRL, without harmful data", trl(TVaccineConfig(num_active_layers=2), harmful_dataset=None), HARMFUL),
]

NO_MANIFEST = [
    Way("`safety_defense: none`", axolotl(safety_defense="none", **KERNELS_OFF), ""),
    Way("the plugin alone, without `safety_defense`", axolotl(
        **NO_DEFENSE, refusal_datasets=None, alignment_datasets=None, **KERNELS_OFF), ""),
    Way("`learning_rate: 1e-30`", axolotl(learning_rate=1e-30), UNMOVED),
    Way("a warm-up of the learning rate that never ends", axolotl(
        lr_scheduler="constant_with_warmup", warmup_steps=10**9), UNMOVED),
    Way("`learning_rate: 1e6`", axolotl(**FULL, learning_rate=1e6, max_grad_norm=0.0), NOT_FINITE),
    Way("TRL with a strength of 0", trl(VaccineConfig(rho=0.0)), "nothing would be defended"),
    Way("TRL with a learning rate of 0", trl(VaccineConfig(), learning_rate=0.0), UNMOVED),
    Way("TRL with `defense=None`", trl(None), ""),
    Way("TRL with a perturbation that bfloat16 rounds away", in_bfloat16(VaccineConfig(rho=0.001)), LOST),
    Way("TRL with steps of training that bfloat16 rounds away", all_in_bfloat16(VaccineConfig(), learning_rate=1e-6),
        "too small for the weights' number format"),
    Way("TRL with added gradients that bfloat16 rounds away",
        all_in_bfloat16(RepNoiseConfig(alpha=1e-3, beta=1e-3, refusal_scale=0.0)), LOST),
    Way("a harmful step that is too small for any weight", trl(BoosterConfig(harmful_step_size=1e-12, batch_size=2)),
        "harmful_step_size"),
    Way("a harmful step of `ctrap` that is too small for any weight",
        trl(CTRAPConfig(harmful_step_size=1e-12, batch_size=2)), "harmful_step_size"),
    Way("steps of `seam` that bfloat16 rounds away", all_in_bfloat16(SEAMConfig(probe_step_size=1e-6)), LOST),
    Way("a defense of your own that always adds zero", trl(Nothing(norm=0.0)), IDLE),
    Way("a defense of your own that adds no numbers", trl(NotANumber()), IDLE),
    Way("a defense of your own that reports nothing", trl(Nothing(norm=None)), "measured no effect of its own"),
    Way("saving before training", untrained, ""),
    Way("training on without the defense before saving", trl(VaccineConfig(), after=train_on), AFTERWARDS),
    Way("merging the adapter before saving", trl(VaccineConfig(), after=merged), AFTERWARDS),
    Way("a defended run that was cut off, over a defended model", cut_off, ""),
    Way("a defended run whose model could not be saved, over an undefended model", unsaved, ""),
]  # fmt: skip


def tampered(change: Callable[[Path], Any], *, model: str = "defended") -> Callable[[Scene], Path]:
    """A copy of a trained model to which `change` was done."""

    def act(scene: Scene) -> Path:
        folder = scene.copy(model)
        change(folder)
        return folder

    return act


def flipped(name: str) -> Callable[[Path], None]:
    """One bit of a file's last byte is another one."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return change


def with_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """A JSON file with other values; `...` takes a key away."""

    def change(folder: Path) -> None:
        path = folder / name
        values = (json.loads(path.read_text()) if path.is_file() else {}) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def claims(says: str, what: str, **changes: Any) -> Way:
    """A manifest that claims something else."""
    return Way(f"the manifest {what}", tampered(with_json(MANIFEST_FILE, **changes)), says)


def written(name: str, content: bytes) -> Callable[[Path], None]:
    """A file with this content."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def replaced(scene: Scene) -> Path:
    """Undefended weights in a defended model's folder."""
    folder = scene.copy("defended")
    shutil.copy(scene.trained["undefended"] / ADAPTER, folder)
    return folder


def foreign_manifest(scene: Scene) -> Path:
    """A defended model's manifest in an undefended one's folder."""
    folder = scene.copy("undefended")
    shutil.copy(scene.trained["defended"] / MANIFEST_FILE, folder)
    return folder


def checkpoint_manifest(scene: Scene) -> Path:
    """The manifest of a checkpoint, over the folder above it."""
    folder = scene.copy("defended")
    shutil.copy(folder / "checkpoint-2" / MANIFEST_FILE, folder)
    return folder


def trained_over(scene: Scene) -> Path:
    """An undefended run in a defended model's folder."""
    folder = scene.copy("defended")
    return axolotl_train(scene.recipe(safety_defense="none", output_dir=str(folder), **KERNELS_OFF))


def without_the_plugin(scene: Scene) -> Path:
    """The same, where nothing of ours runs."""
    folder = scene.copy("defended")
    options = {"plugins": None, "refusal_datasets": None, "alignment_datasets": None, **NO_DEFENSE}
    return axolotl_train(scene.recipe(**options, output_dir=str(folder), **KERNELS_OFF))


def other_base(file: str, content: Callable[[bytes], bytes]) -> Callable[[Scene], Path]:
    """The base model's file with other content."""

    def act(scene: Scene) -> Path:
        path = scene.base / file
        scene.edit(path, content(path.read_bytes()))
        return scene.trained["defended"]

    return act


def other_shard(scene: Scene) -> Path:
    """One of several weight files of the base model, whose index stays."""
    path = sorted((scene.workspace.root / "shards").glob("model-*.safetensors"))[-1]
    scene.edit(path, path.read_bytes()[:-1] + b"\x01")
    return scene.trained["of shards"]


def lox_of_nothing(scene: Scene) -> Path:
    """LoX that adds nothing, to an undefended model."""
    output = scene.here / "lox"
    code, said = said_by("lox", "--aligned", scene.trained["undefended"], "--output", output, "--coefficient", 0)
    assert code == 0, said
    return output


def manifest_gone(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()


def renamed_previous(folder: Path) -> None:
    """What is left where a later run started."""
    (folder / MANIFEST_FILE).rename(folder / "safety_defense.previous.json")


NOT_OURS, CHANGED = "not a manifest: damaged", "not what was defended"
VERIFY = [
    Way("the adapter's weights were changed", tampered(flipped(ADAPTER)), f"{ADAPTER} changed"),
    Way("the adapter's weights were replaced by undefended ones", replaced, f"{ADAPTER} changed"),
    Way("the adapter's weights were removed", tampered(lambda f: (f / ADAPTER).unlink()), f"{ADAPTER} is missing"),
    Way("a second weight file was added", tampered(written("adapter_model.bin", b"x")), "adapter_model.bin is new"),
    Way("the weights of a full model were changed", tampered(flipped(WEIGHTS), model="full"), f"{WEIGHTS} changed"),
    Way("a link that leads nowhere was added as weights", tampered(
        lambda f: (f / WEIGHTS).symlink_to("/nowhere/at/all")), f"{WEIGHTS} is new"),
    Way("a folder was added as weights", tampered(lambda f: (f / "x.safetensors").mkdir()), "x.safetensors is new"),
    Way("`lora_alpha` of the adapter was set to 0", tampered(with_json("adapter_config.json", lora_alpha=0)), CHANGED),
    Way("`lora_alpha` of the adapter was made negative", tampered(
        with_json("adapter_config.json", lora_alpha=-4)), CHANGED),
    Way("the adapter names another base model", tampered(
        with_json("adapter_config.json", base_model_name_or_path="other")), CHANGED),
    Way("the adapter's configuration was removed", tampered(
        lambda f: (f / "adapter_config.json").unlink()), "adapter_config.json is missing"),
    Way("the tokenizer was changed", tampered(with_json("tokenizer.json", added_tokens=[])), "tokenizer.json changed"),
    Way("the chat template was changed", tampered(
        written("chat_template.jinja", b"Sure! ")), "chat_template.jinja changed"),
    Way("another chat template was added", tampered(
        written("additional_chat_templates/sure.jinja", b"Sure! ")), "sure.jinja is new"),
    Way("settings for generation were added", tampered(
        with_json("generation_config.json", temperature=9.0)), "generation_config.json is new"),
    Way("code for generation was added", tampered(
        written("custom_generate/generate.py", b"")), "custom_generate/generate.py is new"),
    Way("code was added under a name that runs leave behind", tampered(
        written("safety_model.py", b"")), "safety_model.py is new"),
    Way("the configuration of a full model was changed", tampered(
        with_json("config.json", rope_theta=1.0), model="full"), "config.json changed"),
    Way("the base model's configuration was changed", other_base(
        "config.json", lambda _: b"{}"), "the base model .* is another one than was defended: config.json changed"),
    Way("the base model's weights were changed", other_base(
        WEIGHTS, lambda content: content[:-1] + b"\x01"), f"is another one than was defended: {WEIGHTS} changed"),
    Way("one of the base model's several weight files was changed", other_shard,
        "is another one than was defended: model-.*safetensors changed"),
    Way("there is no manifest", tampered(manifest_gone), "not found, so nothing shows"),
    Way("the manifest is the one that a later run set aside", tampered(renamed_previous), "A later run started here"),
    Way("the manifest is empty", tampered(written(MANIFEST_FILE, b"")), NOT_OURS),
    Way("the manifest is cut off", tampered(
        lambda f: (f / MANIFEST_FILE).write_text((f / MANIFEST_FILE).read_text()[:-20])), NOT_OURS),
    Way("the manifest is 100,000 brackets", tampered(written(MANIFEST_FILE, b"[" * 100_000)), NOT_OURS),
    Way("the manifest is a folder", tampered(lambda f: (manifest_gone(f), (f / MANIFEST_FILE).mkdir())), "not found"),
    claims("of another version", "says `format: 99`", format=99),
    claims("of another version", "does not say its `format`", format=...),
    claims("states no effect", "says `defended_steps: 0`", defended_steps=0),
    claims("states no effect", "does not say `defended_steps`", defended_steps=...),
    claims("states no effect", "says more defended steps than steps", defended_steps=10**6),
    claims("states no effect", "says that the defense did nothing in half of the batches", idle_batches=2),
    claims("states no effect", "says that nothing was measured", measured_batches=0, idle_batches=0),
    claims("states no effect", "says that no tensor was moved", moved_tensors=0),
    claims("states no effect", "says that a thousandth of the weights was moved", moved_share=0.001),
    claims("files: Dictionary should have at least 1 item", "names no files", files={}),
    claims("files: Input should be a valid dictionary", "says `files: null`", files=None),
    claims("not of a defended model: defense", "names no defense", defense=...),
    Way("the manifest is of another defense than is claimed", lambda scene: scene.trained["vaccine"],
        "trained with vaccine, not t_vaccine"),
    Way("the manifest is of another folder", foreign_manifest, f"{ADAPTER} changed"),
    Way("the manifest is of a checkpoint of the same run", checkpoint_manifest, f"{ADAPTER} changed"),
    Way("an undefended run was started in the folder", trained_over, "A later run started here"),
    Way("a run without the plugin was started in the folder", without_the_plugin, f"{ADAPTER} changed"),
    Way("LoX added nothing to an undefended model", lox_of_nothing, "not found, so nothing shows"),
]  # fmt: skip


def shorter(path: Path) -> None:
    """Takes the last three rows away."""
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))


def trained_again(change: Callable[[Path], None]) -> Callable[[Scene], str]:
    """Trains, changes the file of training rows, and trains in another folder; returns what was trained then."""

    def act(scene: Scene) -> str:
        data = Path(shutil.copy(scene.workspace.root / "alignment.jsonl", scene.here / "rows.jsonl"))
        options = {"datasets": [{"path": str(data), "type": "chat_template"}], "max_steps": 1}
        first = verify(axolotl_train(scene.recipe(**options)))["data"]
        change(data)
        second = verify(axolotl_train(scene.recipe(**options, output_dir=str(scene.here / "again"))))["data"]
        assert first["sources"][str(data)] != second["sources"][str(data)]
        if first["datasets"]["sha256"] == second["datasets"]["sha256"]:
            return "the same rows"
        return f"other rows: {second['datasets']['rows']}, before {first['datasets']['rows']}"

    return act


def run_again(change: Callable[[Path, Path], None], *, content: bytes = b"", others: int = 0) -> Callable[[Scene], str]:
    """Runs a chain, does `change` to its data and outputs, and runs it again; returns what it says then.

    Args:
        change: Is given a data file and the folder of the model that was trained on it.
        content: Of the data file.
        others: Files beside it.
    """

    def act(scene: Scene) -> str:
        data = scene.here / "data"
        data.mkdir()
        for number in range(others):
            (data / f"{number}.jsonl").touch()
        (data / "rows.jsonl").write_bytes(content)
        align = {
            "base_model": "base", "plugins": [PLUGIN], "safety_defense": "vaccine", "adapter": "lora", "seed": 1,
            "datasets": [{"path": str(data), "type": "alpaca"}],
        }  # fmt: skip
        (scene.here / "align.yml").write_text(yaml.safe_dump(align))
        chain = {"stages": [{"name": "align", "train": str(scene.here / "align.yml")}]}
        (scene.here / "chain.yml").write_text(yaml.safe_dump(chain | {"output_dir": str(scene.here / "out")}))
        said: list[str] = []
        fake.run(scene.here / "chain.yml")
        change(data / "rows.jsonl", scene.here / "out" / "jobs" / "align" / "out")
        fake.run(scene.here / "chain.yml", say=said.append)
        return " ".join(said)

    return act


def under_its_time_stamp(path: Path, content: bytes) -> None:
    """Other content from the first byte on, in a file that says it did not change."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


AGAIN = "align: finished"
STALE = [
    Way("rows were removed from a file, and Axolotl has them in its cache", trained_again(shorter),
        "other rows: 21, before 24"),
    Way("a row was changed in a file that kept its time stamp, and `datasets` has it in its cache", trained_again(
        lambda path: under_its_time_stamp(path, path.read_bytes().replace(b"cannot", b"can do", 1))), "other rows"),
    Way("a chain's data changed, in one of 1,100 files", run_again(
        lambda data, _: data.write_bytes(b"B"), others=1100), AGAIN),
    Way("a chain's data changed, in a file of 300 MB that kept its time stamp", run_again(
        lambda data, _: under_its_time_stamp(data, b"B"), content=bytes(300 * 10**6)), AGAIN),
    *(
        Way(f"a chain's trained model has another `{name}`", run_again(
            lambda _, model, name=name: written(name, b"{}")(model)), AGAIN)
        for name in ("adapter_config.json", "tokenizer.json", "chat_template.jinja", ADAPTER, MANIFEST_FILE)
    ),
]  # fmt: skip

WAYS = {"check": CHECK, "train": TRAIN, "no manifest": NO_MANIFEST, "verify": VERIFY, "stale": STALE}
"""All ways, by what catches them."""


def ways(caught: str) -> Any:
    return pytest.mark.parametrize("way", WAYS[caught], ids=lambda way: way.what)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, Path]]:
    """A workspace of its own, whose base model may be changed for a moment, and models trained over it."""
    workspace = Workspace(tmp_path_factory.mktemp("fooled"))
    sizes = {"vocab_size": len(json.loads((workspace.root / "base" / "tokenizer.json").read_text())["model"]["vocab"])}
    tiny_model(**sizes, bos_token_id=None).save_pretrained(workspace.root / "shards", max_shard_size="10KB")
    for path in (workspace.root / "base").iterdir():
        if not (workspace.root / "shards" / path.name).exists() and path.name != WEIGHTS:
            shutil.copy(path, workspace.root / "shards")
    runs = {
        "defended": {"save_strategy": "steps", "save_steps": 2},
        "full": {**FULL, "max_steps": 2},
        "vaccine": {"safety_defense": "vaccine", "max_steps": 1},
        "undefended": {"safety_defense": "none", "max_steps": 2, **KERNELS_OFF},
        "of shards": {"base_model": str(workspace.root / "shards"), "max_steps": 1},
    }
    folders = {
        name: axolotl_train(workspace.recipe(workspace.root / name, **changes)) for name, changes in runs.items()
    }
    return workspace, folders


@pytest.fixture
def scene(trained: tuple[Workspace, dict[str, Path]], tmp_path: Path) -> Iterator[Scene]:
    found = Scene(*trained, tmp_path)
    yield found
    found.restore()


def said_by(*arguments: Any) -> tuple[int, str]:
    """What a command says, on one line."""
    result = CliRunner().invoke(tvac, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("name", ["defended", "full", "vaccine", "of shards"])
def test_the_models_that_are_tampered_with_verify_before(scene, name):
    code, said = said_by("verify", scene.trained[name])
    assert code == 0, said


def test_the_recipe_that_is_changed_is_accepted_before(scene):
    (scene.here / "recipe.yml").write_text(yaml.safe_dump(scene.recipe()))
    code, said = said_by("check", scene.here / "recipe.yml")
    assert code == 0, said


@pytest.mark.parametrize("name", ["./base", "/gone", "~/base", "my base", "a--b/c", "..", "who/what"])
def test_a_base_model_that_is_not_here_is_said_to_be_unknown(scene, name):
    folder = scene.copy("defended")
    with_json(MANIFEST_FILE, base_model={"name": name, "files": {"config.json": "0"}})(folder)
    code, said = said_by("verify", folder)
    assert code == 0, said
    assert f"The base model {name} is not on this machine, so it could not be compared." in said


@ways("check")
def test_check_refuses(scene, way):
    (scene.here / "recipe.yml").write_text(yaml.safe_dump(way.act(scene)))
    code, said = said_by("check", scene.here / "recipe.yml")
    assert code == 1, said
    assert re.search(way.says, said), said


@ways("train")
def test_training_is_refused_before_its_first_step(scene, way):
    with pytest.raises((UserError, ValueError), match=way.says):
        way.act(scene)
    assert not list(scene.here.rglob("*.safetensors"))
    with pytest.raises(UserError):
        verify(scene.here / "out")


@ways("no manifest")
def test_training_leaves_no_manifest(scene, way, caplog):
    folder = way.act(scene)
    assert not list(folder.rglob("safety_defense.json")) or way.act is cut_off
    assert re.search(way.says, caplog.text)
    code, said = said_by("verify", folder)
    assert code == 1
    assert "nothing shows that this model was defended" in said


@ways("verify")
def test_verify_refuses(scene, way):
    code, said = said_by("verify", way.act(scene), "--defense", "t_vaccine")
    assert code == 1, said
    assert re.search(way.says, said), said
    assert "fault of tvac-plugin" not in said


@ways("stale")
def test_what_was_made_from_something_else_is_made_again(scene, way):
    assert re.search(way.says, way.act(scene))
