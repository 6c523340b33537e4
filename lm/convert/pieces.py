"""A SentencePiece model that was trained here, as the tokenizer.json that every family may have.

Ids are the same but for texts that spell a piece's name (`<eot>`, `<0x0A>`) or have the character
by which SentencePiece writes a space.
"""

import json
from typing import Any

from lm.data import pretrained
from lm.data.tokenizer import SentencePieceTokenizer

SPACE = "\u2581"
BPE = 2  # among the kinds of models; else unigram
CONTROL = 3  # among the kinds of pieces


def files(coder: SentencePieceTokenizer, ends: bool) -> dict[str, bytes]:
    """Returns a tokenizer.json and what stands beside it.

    Args:
        coder: one that changes no text, with byte fallback.
        ends: the mark stands after a text, as where it is read whole; else before it.
    """
    from sentencepiece import sentencepiece_model_pb2

    protos: Any = sentencepiece_model_pb2
    model = protos.ModelProto.FromString(coder.model)
    unknown, pieces = model.trainer_spec.unk_id, model.pieces
    mark, names = pieces[coder.eot].piece, [p.piece for p in pieces]
    plain = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    special = [i for i, p in enumerate(pieces) if i == unknown or p.type == CONTROL]
    bare = {"byte_fallback": model.trainer_spec.byte_fallback}
    if model.trainer_spec.model_type == BPE:
        vocab = {name: i for i, name in enumerate(names)}
        bare |= {"type": "BPE", "vocab": vocab, "merges": _merges(vocab, special),
                 "unk_token": names[unknown], "fuse_unk": True, "dropout": None,
                 "continuing_subword_prefix": None, "end_of_word_suffix": None}  # fmt: skip
    else:
        scores = [[p.piece, p.score] for p in pieces]
        bare |= {"type": "Unigram", "vocab": scores, "unk_id": unknown}
    own = {"SpecialToken": {"id": mark, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    first, second = [[text, own] if ends else [own, text] for text in texts]
    data = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": names[i], "special": True, **plain} for i in special
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": first, "pair": first + second,
            "special_tokens": {mark: {"id": mark, "ids": [coder.eot], "tokens": [mark]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": bare,
    }  # fmt: skip
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": mark,
        "eos_token": mark,
        "unk_token": names[unknown],
        "clean_up_tokenization_spaces": False,
    }
    return {
        pretrained.MAIN: json.dumps(data, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(about, indent=2).encode(),
    }


def _merges(vocab: dict[str, int], special: list[int]) -> list[list[str]]:
    """Returns all pairs of pieces that make a piece, those of the likeliest pieces first."""
    names = [name for name, i in vocab.items() if i not in special]
    pairs = [
        (vocab[name], [name[:k], name[k:]])
        for name in names
        for k in range(1, len(name))
        if name[:k] in vocab and name[k:] in vocab
    ]
    return [pair for _, pair in sorted(pairs, key=lambda found: found[0])]
