"""Small configs of every family, as transformers takes them."""

import json
from typing import Any

MARKS = {"bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **MARKS,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama 2": {**SMALL, "model_type": "llama", "rms_norm_eps": 1e-5},
    "llama 3, tied": {
        **SMALL,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 300,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 64,
        **MARKS,
    },
    "qwen2": {
        **SMALL,
        "model_type": "qwen2",
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 16},
    "gemma": {**SMALL, "model_type": "gemma", "head_dim": 16},
    "gemma2": {
        **SMALL,
        "model_type": "gemma2",
        "head_dim": 16,
        "num_hidden_layers": 5,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        **SMALL,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "num_hidden_layers": 7,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "mistral": {**SMALL, "model_type": "mistral", "sliding_window": 8, "head_dim": 16},
}

# What makes ours compute what theirs does in training: no losses besides the likelihood's.
SETS: dict[str, list[str]] = {}


def write_json(path: Any, data: Any) -> None:
    path.write_text(json.dumps(data))
