"""LoX against an independent decomposition, on adapters and checkpoints that PEFT and transformers wrote."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.manifests import manifest_of
from tests.support.models import tiny_model, with_lora
from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import write_json
from tvac_plugin.cli import tvac
from tvac_plugin.lox import apply_lox, extrapolate, extrapolate_factors
from tvac_plugin.provenance.manifest import MANIFEST_FILE, verify
from tvac_plugin.provenance.model_files import file_hashes

SETTINGS = {"rank": 1, "coefficient": 1.25}


def expected(delta, *, rank, coefficient):
    """The paper's update of one weight, by NumPy's decomposition."""
    delta = delta.detach().double().numpy()
    left, values, right = np.linalg.svd(delta)
    truncated = sum(values[i] * np.outer(left[:, i], right[i]) for i in range(min(rank, len(values))))
    return torch.from_numpy(delta + coefficient * truncated)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def close(ours, reference, tolerance=1e-8):
    torch.testing.assert_close(ours.double(), reference.double(), atol=tolerance, rtol=tolerance)


def entries_of(root):
    return sorted(path.name for path in root.iterdir())


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def seal(folder):
    """A manifest as a defended run leaves it."""
    manifest = manifest_of(file_hashes(folder))
    write_json(folder / MANIFEST_FILE, manifest)
    return manifest


@pytest.fixture
def adapter(tmp_path):
    with_lora(tiny_model()).save_pretrained(tmp_path / "aligned")
    return tmp_path / "aligned"


def save_checkpoints(root, *, dtype=torch.float32, **options):
    """A base of one file and, as aligned model, one whose weights were all moved a little."""
    model = tiny_model().to(dtype)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(root / "aligned", **options)
    return root / "aligned", root / "base"


@pytest.fixture
def checkpoints(tmp_path):
    return save_checkpoints(tmp_path)


def tensors_in(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


# The step on one weight


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 5)])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_the_dense_step_is_the_papers(shape, rank):
    delta = normal(*shape)
    close(extrapolate(delta, rank=rank, coefficient=1.25), expected(delta, rank=rank, coefficient=1.25))


@pytest.mark.parametrize(("out", "r", "inner"), [(12, 4, 9), (5, 4, 9), (3, 4, 9), (12, 4, 2)])
@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_the_factored_step_is_the_dense_one(out, r, inner, rank):
    a, b = normal(r, inner), normal(out, r)
    new_a, new_b = extrapolate_factors(a, b, rank=rank, coefficient=0.7)
    assert (new_a.shape, new_b.shape) == (a.shape, b.shape)
    close(new_b @ new_a, extrapolate(b @ a, rank=rank, coefficient=0.7))
    close(new_b @ new_a, expected(b @ a, rank=rank, coefficient=0.7))


def test_singular_values_far_apart_are_told_apart():
    left, right = torch.linalg.qr(normal(12, 7)).Q, torch.linalg.qr(normal(7, 7)).Q
    delta = (left * 10.0 ** -torch.arange(7, dtype=torch.float64)) @ right.T
    close(extrapolate(delta, rank=4, coefficient=2.0), expected(delta, rank=4, coefficient=2.0), 1e-12)


def test_coefficient_zero_changes_nothing():
    delta, a, b = normal(6, 5), normal(3, 5), normal(6, 3)
    assert extrapolate(delta, rank=2, coefficient=0.0).equal(delta)
    assert all(map(torch.equal, extrapolate_factors(a, b, rank=2, coefficient=0.0), (a, b)))


@pytest.mark.parametrize("rank", [3, 4, 50])
def test_from_the_rank_of_the_change_on_it_is_scaled(rank):
    a, b = normal(3, 8), normal(6, 3)
    new_a, new_b = extrapolate_factors(a, b, rank=rank, coefficient=1.25)
    close(new_b @ new_a, 2.25 * b @ a)
    close(extrapolate(b @ a, rank=rank, coefficient=1.25), 2.25 * b @ a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_kept(dtype):
    a, b = normal(3, 8, dtype=dtype), normal(6, 3, dtype=dtype)
    assert extrapolate(b @ a, rank=1, coefficient=1.0).dtype == dtype
    assert {factor.dtype for factor in extrapolate_factors(a, b, rank=1, coefficient=1.0)} == {dtype}


def test_an_untrained_adapter_stays_zero():
    assert not extrapolate_factors(normal(3, 8), torch.zeros(6, 3), rank=2, coefficient=1.0)[1].any()


@pytest.mark.parametrize(
    ("delta", "settings", "message"),
    [
        (torch.zeros(3), {}, r"\[3\], not a matrix. Give"),
        (torch.full((2, 2), torch.nan), {}, "not finite. Align"),
        (torch.full((2, 2), 6e4, dtype=torch.float16), {}, "beyond torch.float16. Lower the coefficient"),
        (torch.ones(2, 2), {"rank": 0}, "rank: 0 .* Set it to 1 or more"),
        (torch.ones(2, 2), {"coefficient": -0.1}, "coefficient: -0.1 .* Set it to 0 or more"),
        (torch.ones(2, 2), {"coefficient": torch.inf}, "coefficient: inf"),
        (torch.ones(2, 2), {"coefficient": torch.nan}, "coefficient: nan"),
    ],
)
def test_the_step_refuses(delta, settings, message):
    with pytest.raises(UserError, match=message):
        extrapolate(delta, **SETTINGS | settings)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"A is \[3, 8\] and B is \[6, 2\]. Give A"):
        extrapolate_factors(normal(3, 8), normal(6, 2), **SETTINGS)


# Adapters

TARGETS = ["q_proj", "down_proj"]


def check_merged(aligned, output, *, rank, coefficient, layers):
    """Holds what PEFT merges from `output` against the dense update by what it merges from `aligned`."""
    base = dict(tiny_model().named_parameters())
    ours, before = (PeftModel.from_pretrained(tiny_model(), folder).merge_and_unload() for folder in (output, aligned))
    before = dict(before.named_parameters())
    changed = 0
    for name, value in ours.named_parameters():
        delta = before[name] - base[name]
        is_matrix = any(layer in name for layer in layers)
        changed += is_matrix
        reference = base[name] + expected(delta, rank=rank, coefficient=coefficient) if is_matrix else before[name]
        close(value.detach(), reference.detach(), 1e-5)
    assert changed


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_peft_loads_the_extrapolated_adapter(adapter, tmp_path, rank):
    apply_lox(adapter, tmp_path / "out", rank=rank, coefficient=1.25)
    check_merged(adapter, tmp_path / "out", rank=rank, coefficient=1.25, layers=["_proj"])


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 1}},
        {"use_rslora": True, "bias": "lora_only"},
        {"init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_every_scaling_and_layer_of_lora(tmp_path, options):
    options = {"target_modules": TARGETS, "r": 3, "lora_alpha": 5} | options
    model = get_peft_model(tiny_model(), LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "aligned")
    apply_lox(tmp_path / "aligned", tmp_path / "out", rank=2, coefficient=0.8)
    check_merged(tmp_path / "aligned", tmp_path / "out", rank=2, coefficient=0.8, layers=options["target_modules"])


def test_only_b_changes_and_the_rest_is_copied(adapter, tmp_path):
    for name in ("tokenizer.json", "safety_trace.jsonl", "training_args.bin", "optimizer.pt", "pytorch_model.bin"):
        (adapter / name).write_text(name)
    for name in ("checkpoint-1", "additional_chat_templates"):
        (adapter / name).mkdir()
        (adapter / name / "file").write_text(name)
    apply_lox(adapter, tmp_path / "out", **SETTINGS)
    old, new = tensors_in(adapter), tensors_in(tmp_path / "out")
    assert {name for name in old if not old[name].equal(new[name])} == {name for name in old if "lora_B" in name}
    left_behind = {"optimizer.pt", "pytorch_model.bin", "training_args.bin", "checkpoint-1"}
    assert set(entries_of(tmp_path / "out")) == {*entries_of(adapter), MANIFEST_FILE} - left_behind
    for name in ("adapter_config.json", "README.md", "tokenizer.json", "additional_chat_templates/file"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "with use_dora the change is not B A. Merge"),
        ({"target_parameters": ["experts.weight"]}, "with target_parameters"),
        ({"use_qalora": True}, "with use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "with use_bdlora"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA, not LORA. Merge"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 moves the base.* Convert"),
        ({"init_lora_weights": "loftq"}, "loftq moves the base"),
    ],
)
def test_other_adapters_are_refused(adapter, tmp_path, changes, message):
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=f"adapter_config.json: .*{message}"):
        apply_lox(adapter, tmp_path / "out", **SETTINGS)
    assert entries_of(tmp_path) == ["aligned"]


def test_an_adapter_needs_no_base(adapter, tmp_path):
    with pytest.raises(UserError, match="a base is not needed. Leave out --base"):
        apply_lox(adapter, tmp_path / "out", base=tmp_path, **SETTINGS)


def rewrite(file, change):
    """Saves the tensors of `file` after `change` has had them."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


LAYER = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{LAYER}.lora_B.weight"), "lora_A.weight has no matrix B.* Save"),
        (lambda tensors: tensors.pop(f"{LAYER}.lora_A.weight"), "lora_B.weight has no matrix A.* Save"),
        (
            lambda tensors: tensors.update({f"{LAYER}.lora_A.weight": torch.ones(2, 3, 1, 1)}),
            r"F32 \[2, 3, 1, 1\], not",
        ),
        (lambda tensors: tensors.update({f"{LAYER}.lora_B.weight": torch.ones(2, 3).int()}), "I32.*Merge"),
        (
            lambda tensors: tensors.update({f"{LAYER}.lora_B.weight": torch.full((16, 2), torch.nan)}),
            "B has values that",
        ),
        (lambda tensors: tensors.update({f"{LAYER}.lora_B.weight": torch.ones(16, 5)}), r"A is \[2, 32\] and B is"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors)], "holds no LoRA matrices. Name"),
        (lambda tensors: [tensor.zero_() for tensor in tensors.values()], "no weight changed: .* Name another base"),
    ],
)
def test_bad_matrices_are_refused(adapter, tmp_path, change, message):
    rewrite(adapter / "adapter_model.safetensors", change)
    with pytest.raises(UserError, match=message):
        apply_lox(adapter, tmp_path / "out", **SETTINGS)
    assert entries_of(tmp_path) == ["aligned"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json: not JSON: .* Save"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "adapter_config.json: not a JSON object. Save"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"no"), "cannot be read as safetensors: .* Save"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors. Name"),
        (
            lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
            "weights in .bin files. Save it again with safe_serialization",
        ),
    ],
)
def test_damaged_adapters_are_refused(adapter, tmp_path, break_it, message):
    break_it(adapter)
    with pytest.raises(UserError, match=message):
        apply_lox(adapter, tmp_path / "out", **SETTINGS)
    assert entries_of(tmp_path) == ["aligned"]


# Full checkpoints


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_are_extrapolated_in_their_layout(tmp_path, options, dtype):
    aligned, base = save_checkpoints(tmp_path, dtype=dtype, **options)
    assert (len(list(aligned.glob("*.safetensors"))) > 1) == bool(options)
    apply_lox(aligned, tmp_path / "out", base=base, rank=3, coefficient=1.25)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == dtype
    before, origin, after = tensors_in(aligned), tensors_in(base), tensors_in(tmp_path / "out")
    assert model.state_dict().keys() == after.keys()
    for name, value in after.items():
        if value.ndim != 2:
            assert value.equal(before[name])
            continue
        delta = before[name].double() - origin[name].double()
        reference = origin[name].double() + expected(delta, rank=3, coefficient=1.25)
        assert value.dtype == dtype
        close(value, reference, 1e-6 if dtype == torch.float32 else 1e-2)
    assert entries_of(tmp_path / "out") == sorted([*entries_of(aligned), MANIFEST_FILE])
    for path in aligned.glob("*.safetensors"):
        with safe_open(path, "pt") as old, safe_open(tmp_path / "out" / path.name, "pt") as new:
            assert (old.keys(), old.metadata()) == (new.keys(), new.metadata())
            assert new.metadata() == {"format": "pt"}


def test_weights_that_alignment_left_alone_stay(checkpoints, tmp_path):
    aligned, base = checkpoints
    name = "model.embed_tokens.weight"
    rewrite(
        aligned / "model.safetensors", lambda t: t.update({name: tensors_in(base)[name], "ids": torch.ones(2, 2).int()})
    )
    rewrite(base / "model.safetensors", lambda t: t.update({"ids": torch.zeros(2, 2).int()}))
    apply_lox(aligned, tmp_path / "out", base=base, **SETTINGS)
    after = tensors_in(tmp_path / "out")
    assert after[name].equal(tensors_in(base)[name])
    assert after["ids"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda a, b: rewrite(b / "model.safetensors", lambda t: t.pop("lm_head.weight")),
            "base: has no tensor lm_head",
        ),
        (
            lambda a, b: rewrite(a / "model.safetensors", lambda t: t.pop("lm_head.weight")),
            "aligned: has no tensor lm_",
        ),
        (
            lambda a, b: rewrite(b / "model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(41, 16)})),
            r"base: lm_head.weight is F32 \[41, 16\], in .*aligned F32 \[40, 16\]. Name",
        ),
        (
            lambda a, b: rewrite(
                b / "model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(40, 16).int()})
            ),
            "base: lm_head.weight is I32",
        ),
        (
            lambda a, b: rewrite(a / "model.safetensors", lambda t: t["lm_head.weight"].fill_(torch.inf)),
            "aligned/model.safetensors: lm_head.weight: the change has values that are not finite. Align",
        ),
        (lambda a, b: (b / "model.safetensors").unlink(), "base: has no model.safetensors. Name"),
        (lambda a, b: (a / "model.safetensors").rename(a / "pytorch_model.bin"), "aligned: has its weights in .bin"),
        (lambda a, b: (b / "model.safetensors").rename(b / "pytorch_model.bin"), "base: has its weights in .bin"),
        (lambda a, b: (b / "adapter_config.json").write_text("{}"), "base: an adapter, where .* Merge it"),
        (
            lambda a, b: edit(b / "config.json", quantization_config={"bits": 4}),
            "config.json: the model is quantized. S",
        ),
        (
            lambda a, b: (a / "model.safetensors").write_bytes((b / "model.safetensors").read_bytes()),
            "no weight changed",
        ),
    ],
)
def test_bad_checkpoints_are_refused(checkpoints, tmp_path, break_it, message):
    aligned, base = checkpoints
    break_it(aligned, base)
    with pytest.raises(UserError, match=message):
        apply_lox(aligned, tmp_path / "out", base=base, **SETTINGS)
    assert entries_of(tmp_path) == ["aligned", "base"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "weight_map does not name files of this folder. Save"),
        (["a"], "weight_map does not name files of this folder"),
        ({"lm_head.weight": "../base/model.safetensors"}, "weight_map does not name files of this folder"),
        ({"lm_head.weight": "gone.safetensors"}, "gone.safetensors: cannot be read as safetensors"),
    ],
)
def test_bad_indexes_are_refused(tmp_path, weight_map, message):
    aligned, base = save_checkpoints(tmp_path, max_shard_size="10KB")
    edit(aligned / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(UserError, match=message):
        apply_lox(aligned, tmp_path / "out", base=base, **SETTINGS)
    assert entries_of(tmp_path) == ["aligned", "base"]


def test_a_full_checkpoint_needs_a_base(checkpoints, tmp_path):
    with pytest.raises(UserError, match="aligned: a full model needs the one .* Name it with --base"):
        apply_lox(checkpoints[0], tmp_path / "out", **SETTINGS)


# The output and its manifest


@pytest.mark.parametrize("changes", [{"rank": 0}, {"coefficient": -1.0}, {"coefficient": float("nan")}])
def test_settings_are_checked_first(adapter, tmp_path, changes):
    with pytest.raises(UserError, match="Set it to"):
        apply_lox(adapter, tmp_path / "out", **SETTINGS | changes)
    assert entries_of(tmp_path) == ["aligned"]


@pytest.mark.parametrize("role", ["aligned", "base"])
def test_a_missing_folder_is_named(checkpoints, tmp_path, role):
    folders = dict(zip(("aligned", "base"), checkpoints, strict=True)) | {role: tmp_path / "gone"}
    with pytest.raises(UserError, match="gone: no such folder. Name"):
        apply_lox(output=tmp_path / "out", **folders, **SETTINGS)


def test_only_an_empty_output_is_written(adapter, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    apply_lox(adapter, output, **SETTINGS)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(UserError, match="out: is there already. Name another folder"):
        apply_lox(adapter, output, **SETTINGS)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    with pytest.raises(UserError, match="README.md: is there already"):
        apply_lox(adapter, adapter / "README.md", **SETTINGS)


def test_another_runs_partial_output_is_left_alone(adapter, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(UserError, match="out.partial: another run is writing it or was cut off. Wait"):
        apply_lox(adapter, tmp_path / "out", **SETTINGS)
    assert entries_of(tmp_path) == ["aligned", "out.partial"]


def test_a_cut_off_run_leaves_nothing(adapter, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tvac_plugin.lox.apply.write_copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_lox(adapter, tmp_path / "out", **SETTINGS)
    assert entries_of(tmp_path) == ["aligned"]


def test_the_manifest_of_a_defended_model_is_carried_over(adapter, tmp_path):
    old = seal(adapter)
    apply_lox(adapter, tmp_path / "out", **SETTINGS)
    manifest = verify(tmp_path / "out", defense="t_vaccine")
    assert manifest["lox"] == {**SETTINGS, "aligned_files": old["files"]}
    assert manifest["files"] == file_hashes(tmp_path / "out") != old["files"]
    assert {key: manifest[key] for key in ("format", "defense", "defended_steps")} == {
        key: old[key] for key in ("format", "defense", "defended_steps")
    }


def test_an_undefended_model_gets_a_manifest_of_its_own(tmp_path):
    aligned, base = save_checkpoints(tmp_path, max_shard_size="10KB")
    apply_lox(aligned, tmp_path / "out", base=base, **SETTINGS)
    manifest = verify(tmp_path / "out", defense="lox")
    assert manifest["settings"] == SETTINGS
    assert "defended_steps" not in manifest
    assert "torch" in manifest["versions"]


def test_weights_that_do_not_match_their_manifest_are_refused(adapter, tmp_path):
    seal(adapter)
    rewrite(adapter / "adapter_model.safetensors", lambda t: next(iter(t.values())).add_(1))
    with pytest.raises(UserError, match="adapter_model.safetensors changed in this folder: not what was defended"):
        apply_lox(adapter, tmp_path / "out", **SETTINGS)
    assert entries_of(tmp_path) == ["aligned"]


@pytest.mark.parametrize("is_defended", [True, False])
def test_a_model_is_extrapolated_once(adapter, tmp_path, is_defended):
    if is_defended:
        seal(adapter)
    apply_lox(adapter, tmp_path / "once", **SETTINGS)
    with pytest.raises(UserError, match="safety_defense.json: the model is extrapolated already. Name the aligned one"):
        apply_lox(tmp_path / "once", tmp_path / "twice", **SETTINGS)
    assert entries_of(tmp_path) == ["aligned", "once"]


def test_the_command(adapter, tmp_path):
    seal(adapter)
    arguments = ["lox", "--aligned", str(adapter), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(tvac, arguments)
    assert result.exit_code == 0, result.output
    assert "out: written, with rank 6 and coefficient 1.25." in result.output
    result = CliRunner().invoke(tvac, ["verify", str(tmp_path / "out"), "--defense", "t_vaccine"])
    assert "t_vaccine: 7 of 7 batches defended (all), in 7 of 7 steps" in result.output
    result = CliRunner().invoke(tvac, arguments)
    assert (result.exit_code, "is there already" in result.output) == (1, True)
