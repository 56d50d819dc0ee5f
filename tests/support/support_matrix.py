"""What works, what is refused and what has not been tried: one table, read by the docs and held to its tests."""

from __future__ import annotations

from typing import Literal, NamedTuple

Area = Literal["launch", "precision", "weights", "training"]
Status = Literal["supported", "refused", "untested"]


class Support(NamedTuple):
    """A way to train, and what is known about it.

    Attributes:
        area: What it is a way of.
        feature: What it is called.
        status: Whether it works, is refused when the trainer is built, or has not been tried.
        note: Limits, or why not.
        shown_by: The test that shows it, as `file::function`; empty where there is none.
    """

    area: Area
    feature: str
    status: Status
    note: str
    shown_by: str = ""


_SFT = "tests/trainers/test_sft.py::"
_PLUGIN = "tests/test_plugin.py::"
_PROCESSES = "tests/processes/test_processes.py::"

SUPPORT: tuple[Support, ...] = (
    Support(
        "launch",
        "one process",
        "supported",
        "Run on CPUs only so far.",
        f"{_PLUGIN}test_a_defended_run_leaves_adapter_manifest_and_trace",
    ),
    Support(
        "launch",
        "DDP, TRL's trainer",
        "supported",
        "All defenses, gradient accumulation and resuming; tried with two processes over gloo on CPUs, not with NCCL.",
        f"{_PROCESSES}test_every_defense_trains_as_one_process_that_accumulates",
    ),
    Support(
        "launch",
        "DDP, Axolotl's trainer",
        "supported",
        "As above. `axolotl train` itself starts several processes only on GPUs, which has not been tried.",
        f"{_PROCESSES}test_axolotl_s_trainer_trains_in_two_processes_as_in_one_that_accumulates",
    ),
    Support(
        "launch",
        "DDP, a simulated user under lisa",
        "supported",
        "Axolotl's trainer, two processes over gloo on CPUs; only the first process writes the two manifests.",
        f"{_PROCESSES}test_lisa_defends_a_simulated_user_s_fine_tuning_in_two_processes",
    ),
    Support(
        "launch",
        "DDP on several machines",
        "untested",
        "The code does not know about machines; resuming needs a shared `output_dir`.",
    ),
    Support(
        "launch",
        "DataParallel",
        "refused",
        "Copies of a module are not the module that was hooked.",
        f"{_PROCESSES}test_several_gpus_in_one_process_are_refused",
    ),
    Support(
        "launch",
        "DeepSpeed ZeRO 1 to 3",
        "refused",
        "accelerate runs the engine's optimizer step inside its backward pass.",
        f"{_PROCESSES}test_launches_that_cannot_be_defended_are_refused",
    ),
    Support(
        "launch",
        "FSDP1",
        "refused",
        "Flattened weights cannot be frozen layer by layer.",
        f"{_PROCESSES}test_launches_that_cannot_be_defended_are_refused",
    ),
    Support(
        "launch",
        "FSDP2",
        "refused",
        "t_vaccine, vaccine and random_noise trained as under DDP in a trial over gloo on CPUs, but a run cannot be "
        "resumed while a layer was never drawn (its optimizer has no state to save), and the other defenses read "
        "weight gradients that FSDP2 does not provide.",
        f"{_PROCESSES}test_launches_that_cannot_be_defended_are_refused",
    ),
    Support("precision", "float32", "supported", "", f"{_PLUGIN}test_a_defended_run_leaves_adapter_manifest_and_trace"),
    Support("precision", "bfloat16, without a GPU too", "supported", "", f"{_PLUGIN}test_features_of_the_host_work"),
    Support(
        "precision",
        "fp16",
        "supported",
        "A few steps of t_vaccine and vaccine under autocast and a loss scale on a CPU, within rounding of float32. "
        "`fp16: true` itself needs a GPU, which has not been tried.",
        f"{_SFT}test_fp16_trains_as_float32_within_its_rounding",
    ),
    Support("weights", "LoRA", "supported", "", f"{_SFT}test_one_optimizer_step_is_the_paper_s_gradient"),
    Support(
        "weights",
        "QLoRA (bitsandbytes nf4)",
        "supported",
        "",
        "tests/trainers/test_qlora.py::test_drawn_adapters_learn_and_nothing_else_moves",
    ),
    Support("weights", "full fine-tuning", "supported", "", f"{_PLUGIN}test_features_of_the_host_work"),
    Support(
        "training",
        "gradient accumulation",
        "supported",
        "",
        f"{_SFT}test_metrics_scale_with_the_loss_under_accumulation",
    ),
    Support(
        "training",
        "gradient checkpointing",
        "supported",
        "Only the non-reentrant kind.",
        f"{_SFT}test_checkpointing_changes_no_weight",
    ),
    Support("training", "sample packing", "supported", "", f"{_PLUGIN}test_features_of_the_host_work"),
    Support(
        "training",
        "evaluation during training",
        "supported",
        "",
        f"{_SFT}test_evaluation_during_training_is_undisturbed",
    ),
    Support(
        "training",
        "what TRL's trainer can do",
        "supported",
        "Text, prompts with completions, messages, token ids; packing, losses on the assistant's turns, DFT, tools, a "
        "LoRA on experts, streamed rows, several evaluation sets.",
        "tests/trainers/test_trl_features.py::test_with_t_vaccine_only_drawn_layers_learn_and_the_model_is_sealed",
    ),
    Support(
        "training",
        "resuming",
        "supported",
        "Bit for bit on CPUs, also after `kill -9`, with the same settings, data and number of processes.",
        "tests/trainers/test_resume.py::test_it_may_be_killed_at_any_moment",
    ),
    Support(
        "training",
        "resuming in several processes",
        "supported",
        "As above, with each process's own dropout, between two logs and within an epoch.",
        f"{_PROCESSES}test_two_processes_resume_exactly_between_two_logs_and_within_an_epoch",
    ),
    Support(
        "training",
        "resuming with another number of processes",
        "refused",
        "The number of processes decides which rows a process reads and which random numbers it draws.",
        f"{_PROCESSES}test_one_process_does_not_go_on_where_two_stopped",
    ),
    Support("training", "fused LoRA kernels", "untested", "They need CUDA."),
    Support("training", "flash and flex attention", "untested", "They need CUDA."),
)
"""What is known, beside `configs.refusals.REFUSALS`."""


class HostRun(NamedTuple):
    """A set of host versions, and what was seen with it.

    Attributes:
        host: The versions.
        tried: What was run.
        failed: What failed.
    """

    host: str
    tried: str
    failed: str


HOSTS: tuple[HostRun, ...] = (
    HostRun(
        "Axolotl 0.19.0, Python 3.11, torch 2.13.0, transformers 5.16.1, TRL 1.9.0, PEFT 0.20.0 (`constraints.txt`)",
        "The default tests, the slow tests and the demo.",
        "Nothing.",
    ),
    HostRun(
        "Axolotl 0.21.0, Python 3.12, torch 2.14.1, transformers 5.20.1, TRL 1.14.1, PEFT 0.21.2 "
        "(`constraints-3.12.txt`)",
        "The default tests and the demo; for every change the tests of `make hosts`. Not the slow tests.",
        "Qwen3-Next and Qwen3.5 on CPUs while flash-linear-attention is installed, whose kernels need a GPU.",
    ),
    HostRun(
        "TRL 1.14.1 with what else is in `constraints-3.12.txt`",
        "TRL's own `TestSFTTrainer` as of its 1.10 development version, on stand-ins for its models, with our class in "
        "the place of `SFTTrainer`: the 82 tests that pass with TRL itself and need no GPU.",
        "None without a defense. 10 with vaccine, all refusals by name: layers without attention (3), prompt learning "
        "(5), reentrant checkpointing (2). The same with t_vaccine and `freeze: none`, and 3 for which our harmful "
        "stand-in rows were the training rows; with others these passed.",
    ),
    HostRun("Axolotl 0.20.0", "Nothing. Its source was read: it loads plugins as 0.19 does.", "Unknown."),
    HostRun(
        "TRL 1.16.0 with what else is in `constraints.txt`",
        "`tests/trainers/test_sft.py`, 19 tests.",
        "One: in fp16 on a CPU, a step of vaccine is 22 % from that in float32 for one weight, where 20 % is allowed.",
    ),
)
"""Versions that were tried."""
