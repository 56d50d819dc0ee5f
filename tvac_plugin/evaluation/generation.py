"""Greedy answers of a model, in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.evaluation.pretrained import load_pretrained, refusing_code

ALPACA_TEMPLATE = (
    "{{ bos_token or '' }}{% set task = messages[0]['content'] %}"
    "{{ 'Below is an instruction that describes a task' }}"
    "{{ ', paired with an input that provides further context' if '\\n\\n### Input:\\n' in task else '' }}"
    "{{ '. Write a response that appropriately completes the request.\\n\\n' }}"
    "{{ '### Instruction:\\n' + task + '\\n\\n### Response:\\n' }}"
)
"""Alpaca's prompt as a chat template; a question may carry its own "### Input:" part."""


class Generator:
    """A model with its tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes a loaded model."""
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls, path: Path | str, *, prompt_format: str = "chat_template", trust_remote_code: bool = False
    ) -> Generator:
        """Loads a model, or an adapter together with the model it is for; on the GPU in bfloat16 if there is one.

        Args:
            path: A folder, or a hub id.
            prompt_format: "chat_template" for the tokenizer's own, "alpaca" to put Alpaca's in its place.
            trust_remote_code: Whether Python code that comes with model or tokenizer may run.

        Raises:
            UserError: There is no model in the folder, or it brings code that is not trusted.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        load = partial(load_pretrained, trust_remote_code=trust_remote_code)
        adapter_config = Path(path) / "adapter_config.json"
        if isinstance(path, Path) and not (path / "config.json").is_file() and not adapter_config.is_file():
            raise UserError(f"{path}: no model here. Train it first, or correct the path.")
        if adapter_config.is_file():
            from peft import PeftModel

            base = _base_of(adapter_config)
            model = load(AutoModelForCausalLM, base, dtype=dtype)
            with refusing_code(path, trust_remote_code=trust_remote_code):
                model = PeftModel.from_pretrained(model, path).merge_and_unload()
            has_tokenizer = (Path(path) / "tokenizer_config.json").is_file()
            tokenizer = load(AutoTokenizer, path if has_tokenizer else base)
        else:
            model = load(AutoModelForCausalLM, path, dtype=dtype)
            tokenizer = load(AutoTokenizer, path)
        if prompt_format == "alpaca":
            tokenizer.chat_template = ALPACA_TEMPLATE
        if tokenizer.chat_template is None:
            raise UserError(f"{path}: the tokenizer has no chat template. Set `prompt_format: alpaca`.")
        return cls(model.to(device), tokenizer)

    def prompt(self, question: str) -> str:
        """Puts a question into the format the model was trained with."""
        chat = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))

    @torch.inference_mode()
    def complete(
        self, texts: Sequence[str], *, max_new_tokens: int, batch_size: int, description: str = "generating"
    ) -> list[str]:
        """Continues each text greedily; texts already hold all special tokens.

        Args:
            texts: Whole prompts.
            max_new_tokens: Longest continuation.
            batch_size: Texts at a time, of like length; they are padded on the left.
            description: Of the progress bar.

        Returns:
            The continuations without special tokens, in order.
        """
        longest_first = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        answers = [""] * len(texts)
        for start in tqdm(range(0, len(texts), batch_size), desc=description):
            numbers = longest_first[start : start + batch_size]
            inputs = self.tokenizer(
                [texts[number] for number in numbers],
                return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False,
            ).to(self.model.device)  # fmt: skip
            output = self.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            continued = output[:, inputs.input_ids.shape[1] :]
            for number, answer in zip(
                numbers, self.tokenizer.batch_decode(continued, skip_special_tokens=True), strict=True
            ):
                answers[number] = answer.strip()
        return answers


def _base_of(adapter_config: Path) -> str:
    """The model that an adapter is for."""
    try:
        base = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{adapter_config}: names no `base_model_name_or_path`. Save the adapter again.") from error
    return str(base)
