"""Small configs of every family, as transformers takes them, and a small tokenizer."""

import json
from typing import Any

from lm.data import pretrained

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
DEEPSEEK = {
    **SMALL,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 4,
    "topk_group": 2,
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
    "mixtral": {
        **SMALL,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "qwen2_moe": {
        **SMALL,
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        **SMALL,
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 16,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        **SMALL,
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "swiglu_limit": 0.5,
        "num_hidden_layers": 4,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    "deepseek_v2": {
        **DEEPSEEK,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **DEEPSEEK,
        "model_type": "deepseek_v3",
        "q_lora_rank": 24,
        "attention_bias": True,
        "v_head_dim": 20,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {**SMALL, "model_type": "mistral", "sliding_window": 8, "head_dim": 16},
}

# Those of an encoder and a decoder; most distances are beyond those that are told apart.
T5 = {
    "model_type": "t5",
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
MARIAN = {
    "model_type": "marian",
    "vocab_size": 300,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "forced_eos_token_id": None,
}
READERS: dict[str, dict[str, Any]] = {
    "t5 1.0": T5,
    "t5 1.1": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "marian": MARIAN,
    "marian, relu": {**MARIAN, "activation_function": "relu", "scale_embedding": False},
}
BERT = {
    "model_type": "bert",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**BERT, "architectures": ["BertModel"]},
    "bert, words": {**BERT, "architectures": ["BertForMaskedLM"]},
    "bert, classes": {
        **BERT,
        "architectures": ["BertForSequenceClassification"],
        "hidden_act": "gelu_new",
        "num_labels": 3,
    },
}
EVERY = CONFIGS | READERS | ENCODERS

# What makes ours compute what theirs does in training: no losses besides the likelihood's.
EXPERTS = ["ffn.balance=0", "ffn.z_loss=0"]
SETS: dict[str, list[str]] = {
    name: EXPERTS for name, c in CONFIGS.items() if "num_experts_per_tok" in c
}


def write_json(path: Any, data: Any) -> None:
    path.write_text(json.dumps(data))


TEXTS = ["", "abab cab", "Zwölf ☂ \n\n  tabs\t", "</s> is no mark <s>", "\r\n\0"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "hello",
    "wor",
    "##ld",
    "ham",
    "!",
]


def write_word_pieces(folder):
    """An uncased WordPiece tokenizer as BERT has it, of few words."""
    import tokenizers

    pieces = {piece: i for i, piece in enumerate(PIECES)}
    model = tokenizers.models.WordPiece(pieces, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    made.add_special_tokens(PIECES[:5])
    made.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", 3), ("[CLS]", 2)
    )
    (folder / "tokenizer.json").write_text(made.to_str())
    write_json(folder / "tokenizer_config.json", {"mask_token": "[MASK]"})


def write_tokenizer(folder):
    """A byte-level tokenizer.json whose pieces are single bytes and one merge."""
    letters = sorted(pretrained._byte_of(), key=pretrained._byte_of().get)
    names = ["<s>", "</s>", *letters, "ab"]
    marks = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    data = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [
            {"id": i, "content": name, "special": True, **marks}
            for i, name in enumerate(names[:2])
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
                          "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "ignore_merges": False,
                  "vocab": {name: i for i, name in enumerate(names)}, "merges": ["a b"]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
