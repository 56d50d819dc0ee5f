"""Every family of models that is tested, and those that are refused: one table for the tests and for the docs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """A model type of transformers.

    Attributes:
        title: Models that people know it by.
        attention: What is perturbed with `perturb: attention`: the classes of the layers' attention modules.
        mlp: The same for `perturb: mlp`; empty where a layer has no module for its feed-forward part.
        options: What its configuration needs beside `SIZES`; `None` leaves a size out.
        answers_only: Whether its loss reads `shift_labels` in all versions, so that the head may leave prompts out.
        note: What is special about it.
    """

    title: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    options: Mapping[str, Any] = {}
    answers_only: bool = True
    note: str = ""


class Refused(NamedTuple):
    """A model type that no defense can be bound to.

    Attributes:
        title: Models that people know it by.
        why: The reason in words.
        error: What the error says, as a regular expression.
        options: As of `Family`.
    """

    title: str
    why: str
    error: str
    options: Mapping[str, Any] = {}


SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "use_cache": False,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "hidden_dropout": 0.0,
    "resid_pdrop": 0.0,
}

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_SHARED_EXPERT = _EXPERTS | {"shared_expert_intermediate_size": 16}
_DELTA_NET = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
_NORMED = "The attention output goes through a norm before the residual addition; it is pushed before that norm."
_LINEAR = "Linear-attention layers count as attention."
_RESIDUAL = "Its modules add the residual themselves: the push is the same, but `rep_noise` is refused."

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2, 3", ("LlamaAttention",), ("LlamaMLP",)),
    "llama4_text": Family(
        "Llama 4, text", ("Llama4TextAttention",), ("Llama4TextMLP", "Llama4TextMoe"),
        {"num_local_experts": 2, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 2},
    ),
    "qwen2": Family("Qwen2, Qwen2.5", ("Qwen2Attention",), ("Qwen2MLP",)),
    "qwen2_moe": Family("Qwen1.5-MoE, Qwen2-MoE", ("Qwen2MoeAttention",), ("Qwen2MoeSparseMoeBlock",), _SHARED_EXPERT),
    "qwen3": Family("Qwen3", ("Qwen3Attention",), ("Qwen3MLP",)),
    "qwen3_moe": Family("Qwen3-MoE", ("Qwen3MoeAttention",), ("Qwen3MoeSparseMoeBlock",), _EXPERTS),
    "qwen3_next": Family(
        "Qwen3-Next", ("Qwen3NextAttention", "Qwen3NextGatedDeltaNet"), ("Qwen3NextSparseMoeBlock",),
        _SHARED_EXPERT | _DELTA_NET, note=_LINEAR,
    ),
    "qwen3_5_text": Family(
        "Qwen3.5, text", ("Qwen3_5Attention", "Qwen3_5GatedDeltaNet"), ("Qwen3_5MLP",), _DELTA_NET, note=_LINEAR
    ),
    "mistral": Family("Mistral", ("MistralAttention",), ("MistralMLP",)),
    "ministral3": Family("Ministral 3", ("Ministral3Attention",), ("Ministral3MLP",)),
    "mixtral": Family("Mixtral", ("MixtralAttention",), ("MixtralSparseMoeBlock",), {"num_local_experts": 2}),
    "gemma": Family("Gemma", ("GemmaAttention",), ("GemmaMLP",)),
    "gemma2": Family("Gemma 2", ("Gemma2Attention",), ("Gemma2MLP",), {"query_pre_attn_scalar": 8}, note=_NORMED),
    "gemma3_text": Family(
        "Gemma 3, text", ("Gemma3Attention",), ("Gemma3MLP",), {"query_pre_attn_scalar": 8}, note=_NORMED
    ),
    "gemma4_text": Family(
        "Gemma 4, text", ("Gemma4TextAttention",), ("Gemma4TextMLP",),
        {"hidden_size_per_layer_input": 4, "global_head_dim": 8, "vocab_size_per_layer_input": 40}, note=_NORMED,
    ),
    "phi": Family("Phi-1.5, Phi-2", ("PhiAttention",), ("PhiMLP",)),
    "phi3": Family("Phi-3, Phi-4", ("Phi3Attention",), ("Phi3MLP",)),
    "olmo2": Family("OLMo 2", ("Olmo2Attention",), ("Olmo2MLP",), note=_NORMED),
    "olmo3": Family("OLMo 3", ("Olmo3Attention",), ("Olmo3MLP",), note=_NORMED),
    "olmoe": Family("OLMoE", ("OlmoeAttention",), ("OlmoeSparseMoeBlock",), _EXPERTS),
    "gpt_neox": Family("GPT-NeoX, Pythia", ("GPTNeoXAttention",), ("GPTNeoXMLP",)),
    "opt": Family(
        "OPT", ("OPTAttention",), (), {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
        note="`perturb: mlp` and `rep_noise` are refused: the feed-forward part has no module.",
    ),
    "falcon": Family("Falcon", ("FalconAttention",), ("FalconMLP",), {"head_dim": None}),
    "stablelm": Family("StableLM", ("StableLmAttention",), ("StableLmMLP",)),
    "granite": Family("Granite", ("GraniteAttention",), ("GraniteMLP",), {"logits_scaling": 8.0}),
    "granitemoe": Family(
        "Granite MoE", ("GraniteMoeAttention",), ("GraniteMoeMoE",),
        {"num_local_experts": 2, "num_experts_per_tok": 1, "logits_scaling": 8.0},
    ),
    "gpt2": Family("GPT-2", ("GPT2Attention",), ("GPT2MLP",), {"tie_word_embeddings": False}),
    "gptj": Family("GPT-J", ("GPTJAttention",), ("GPTJMLP",), {"rotary_dim": 4}),
    "gpt_neo": Family(
        "GPT-Neo", ("GPTNeoAttention",), ("GPTNeoMLP",), {"attention_types": [[["global", "local"], 2]]}
    ),
    "gpt_bigcode": Family("StarCoder", ("GPTBigCodeAttention",), ("GPTBigCodeMLP",)),
    "starcoder2": Family("StarCoder2", ("Starcoder2Attention",), ("Starcoder2MLP",)),
    "cohere": Family("Command R", ("CohereAttention",), ("CohereMLP",)),
    "cohere2": Family("Command R7B, Aya", ("Cohere2Attention",), ("Cohere2MLP",)),
    "smollm3": Family("SmolLM3", ("SmolLM3Attention",), ("SmolLM3MLP",)),
    "deepseek_v3": Family(
        "DeepSeek-V3, R1", ("DeepseekV3Attention",), ("DeepseekV3MLP", "DeepseekV3MoE"),
        _ROUTED | _LATENT | {"first_k_dense_replace": 2},
    ),
    "glm4": Family("GLM-4", ("Glm4Attention",), ("Glm4MLP",), note=_NORMED),
    "glm4_moe": Family("GLM-4.5", ("Glm4MoeAttention",), ("Glm4MoeMLP", "Glm4MoeMoE"), _ROUTED),
    "gpt_oss": Family(
        "gpt-oss", ("GptOssAttention",), ("GptOssMLP",), {"num_local_experts": 2, "num_experts_per_tok": 1}
    ),
    "bloom": Family("BLOOM", ("BloomAttention",), ("BloomMLP",), answers_only=False, note=_RESIDUAL),
    "mpt": Family("MPT", ("MptAttention",), ("MptMLP",), note="Its feed-forward module adds the residual itself: the "
                  "push is the same, but `rep_noise` is refused."),
    "exaone4": Family("EXAONE 4", ("Exaone4Attention",), ("Exaone4MLP",), note=_NORMED),
    "nemotron": Family("Nemotron", ("NemotronAttention",), ("NemotronMLP",)),
    "xglm": Family(
        "XGLM", ("XGLMAttention",), (), {"d_model": 16, "ffn_dim": 32, "num_layers": 4, "attention_heads": 2},
        answers_only=False, note="`perturb: mlp` and `rep_noise` are refused: the feed-forward part has no module.",
    ),
}  # fmt: skip
"""Supported families by their `model_type`."""

_NO_ATTENTION = r"layers 0, 2 hold no attention module \({}: {}.*Use a model with attention in every layer\.$"
_TWO_HALVES = "An encoder-decoder."
_BOTH = r"{} cannot be defended: it is an encoder-decoder.*Use a decoder-only language model\.$"
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}

REFUSED: dict[str, Refused] = {
    "t5": Refused(
        "T5", _TWO_HALVES, _BOTH.format("T5ForConditionalGeneration"), {"d_model": 16, "d_ff": 32, "d_kv": 8}
    ),
    "bart": Refused(
        "BART", _TWO_HALVES,
        _BOTH.format("BartForConditionalGeneration"),
        {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    ),
    "mamba": Refused(
        "Mamba", "State-space layers, no attention.",
        r"MambaForCausalLM cannot be defended: its layers hold no attention module \(MambaBlock: norm, mixer\)\. "
        r"Use a model with attention in every layer\.$",
    ),
    "jamba": Refused(
        "Jamba", "Layers without attention: state-space.",
        _NO_ATTENTION.format("JambaMambaDecoderLayer", "mamba, feed_forward"),
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    ),
    "lfm2": Refused(
        "LFM2", "Layers without attention: convolutions.",
        _NO_ATTENTION.format("Lfm2DecoderLayer", "conv, feed_forward"),
        {"layer_types": ["conv", "full_attention"] * 2},
    ),
    "granitemoehybrid": Refused(
        "Granite 4 hybrid", "Layers without attention: state-space.",
        _NO_ATTENTION.format("GraniteMoeHybridDecoderLayer", "input_layernorm, .*mamba"),
        _MAMBA | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 2, "num_experts_per_tok": 1,
                  "shared_intermediate_size": 16},
    ),
    "recurrent_gemma": Refused(
        "RecurrentGemma", "Attention and recurrence are not told apart by name.",
        r"its layers hold no attention module \(RecurrentGemmaDecoderLayer: temporal_pre_norm",
        {"lru_width": 16},
    ),
}  # fmt: skip
"""Refused families by their `model_type`."""
