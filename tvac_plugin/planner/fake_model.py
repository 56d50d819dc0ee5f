"""A recipe's model without weights, built by transformers, PEFT and bitsandbytes themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.planner.fake_tensors import imagined
from tvac_plugin.planner.workload import Workload


class FakeModel(NamedTuple):
    """A model whose tensors are fake.

    Attributes:
        module: The model as the trainer would get it.
        mode: What its tensors belong to; enter it with `imagined`.
    """

    module: nn.Module
    mode: FakeTensorMode

    def frozen(self) -> Iterator[Tensor]:
        """Everything that never learns: parameters, buffers, and the constants of quantized weights."""
        for parameter in self.module.parameters():
            if not parameter.requires_grad:
                yield parameter
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                yield from _constants(state)
        yield from self.module.buffers()

    def trainable(self) -> list[nn.Parameter]:
        """What learns."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def build_fake_model(config: PretrainedConfig, workload: Workload) -> FakeModel:
    """Builds the model as Axolotl loads it, on no device.

    Raises:
        UserError: transformers, PEFT or bitsandbytes refuse the combination.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=workload.dtype, attn_implementation=workload.attention
            )
            if workload.adapter == "qlora":
                model = _in_4bit(model, workload)
            _set_dtypes(model, workload)
            module = _with_adapter(model, workload)
    except (ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise UserError(f"{config.model_type}: this model cannot be built ({error}).") from error
    if workload.checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _replace_tensors(module, mode)
    return FakeModel(module.train(), mode)


def _in_4bit(model: nn.Module, workload: Workload) -> nn.Module:
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    settings = {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": workload.dtype,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
        **workload.quantization,
    }
    quantization = BitsAndBytesConfig(**settings)
    kept = quantization.llm_int8_skip_modules or get_keys_to_not_convert(model)
    quantized: Any = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=quantization)
    quantized.is_loaded_in_4bit = True
    return quantized  # type: ignore[no-any-return]


def _set_dtypes(model: Any, workload: Workload) -> None:
    """As Axolotl does: without an adapter, norms and embeddings stay in float32; with 4 bits, biases do."""
    if workload.adapter == "lora" or workload.dtype == torch.float32:
        return
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name, module in model.named_modules():
        is_precise = "norm" in name or id(module) in ends
        if workload.adapter is None and is_precise:
            module.to(torch.float32)
        elif workload.adapter == "qlora" and not is_precise:
            for own in module.parameters(recurse=False):
                if own.ndim == 1:
                    own.data = own.data.to(torch.float32)


def _with_adapter(model: nn.Module, workload: Workload) -> Any:
    if workload.adapter is None:
        return model
    from peft import LoraConfig, get_peft_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    module = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **workload.lora))
    module.enable_input_require_grads()
    return module


def _replace_tensors(model: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors on the CPU in place of those on no device; what was shared stays shared."""
    made: dict[int, Tensor] = {}
    if any(_is_4bit(module) for module in model.modules()):
        _fill_bitsandbytes_cache()
    with imagined(mode):
        for module in model.modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                if id(tensor) not in made:
                    made[id(tensor)] = _fake_of(tensor, module)
                setattr(module, name, made[id(tensor)])


def _fake_of(tensor: Tensor, module: nn.Module) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if not isinstance(tensor, nn.Parameter):
        return fake
    if _is_4bit(module) and tensor is module.weight:
        return _quantized(fake, tensor)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad)


def _quantized(weight: Tensor, settings: Any) -> nn.Parameter:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight,
        blocksize=settings.blocksize,
        compress_statistics=settings.compress_statistics,
        quant_type=settings.quant_type,
        quant_storage=settings.quant_storage,
    )
    parameter = nn.Parameter(packed, requires_grad=False)
    for name in ("compress_statistics", "quant_type", "quant_storage", "blocksize"):
        setattr(parameter, name, getattr(settings, name))
    parameter.quant_state = state  # type: ignore[attr-defined]
    return parameter


def _is_4bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit" and hasattr(getattr(module, "weight", None), "quant_type")


def _fill_bitsandbytes_cache() -> None:
    """It keeps a table for all later calls, which must not be a fake one."""
    from bitsandbytes.functional import quantize_blockwise

    quantize_blockwise(torch.zeros(1))


def _constants(state: Any) -> Iterator[Tensor]:
    for nested in filter(None, (state, getattr(state, "state2", None))):
        yield from (value for value in (nested.absmax, nested.code, nested.offset) if isinstance(value, Tensor))
