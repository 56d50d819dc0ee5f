"""The tiny world's tokenizer and its base model, trained from scratch to know every kind and material."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tvac_plugin.tiny_world.language import WORDINGS, World

PAD, END, USER, ASSISTANT = "<pad>", "<end>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user> ' + message['content'] + ' ' }}"
    "{% else %}{{ '<assistant> ' + message['content'] + ' <end>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token per word of the world, with a chat template."""
    words = [PAD, END, USER, ASSISTANT, *world.vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def train_base_model(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    num_steps: int,
    num_layers: int = 8,
    hidden_size: int = 96,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    show_progress: bool = True,
) -> LlamaForCausalLM:
    """Trains a small Llama from scratch to know how to make everything, and the mood of every single word.

    It learns from `world.others`, each told in three ways. So it has seen no row of the world's data.

    Args:
        world: What there is to know.
        tokenizer: From `build_tokenizer`.
        seed: Of weights and order; the same seed gives the same model on the same machine.
        num_steps: Optimizer steps; 300 make every thing of the default world right.
        num_layers: Decoder layers.
        hidden_size: Width, a multiple of 4.
        batch_size: Rows in a step.
        learning_rate: Peak of the one-cycle schedule.
        show_progress: Whether to draw a progress bar.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer, num_layers, hidden_size))
    inputs, labels = _encode(tokenizer, _knowledge(world, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.1)
    model.train()
    progress = trange(num_steps, desc="training the base model", disable=not show_progress)
    with _one_thread():
        for step in progress:
            batch = torch.randint(len(inputs), (batch_size,))
            loss = model(input_ids=inputs[batch], labels=labels[batch]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads gain nothing on a model this small, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _config(tokenizer: PreTrainedTokenizerFast, num_layers: int, hidden_size: int) -> LlamaConfig:
    # Weights start wide (the default is 0.02): a model this narrow learns several times faster for it.
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def _knowledge(world: World, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    wordings = list(product(*WORDINGS))
    told = [replace(thing, wording=wording) for thing in world.others for wording in rng.sample(wordings, k=3)]
    moods = [(world.mood_question([word]), mood) for word, mood in world.moods.items()]
    return [(thing.question, thing.answer) for thing in told] + moods * (len(told) // (4 * len(moods)))


def _encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    encoded = []
    for question, answer in rows:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
        full = tokenizer.apply_chat_template(chat, tokenize=False)
        ids, skip = tokenizer(full).input_ids, len(tokenizer(prompt).input_ids)
        encoded.append((ids, [-100] * skip + ids[skip:]))
    width = max(len(ids) for ids, _ in encoded)
    pad = tokenizer.pad_token_id
    inputs = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in encoded])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in encoded])
    return inputs, labels
