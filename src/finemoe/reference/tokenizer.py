"""Rebuild a byte-level BPE tokenizer from the lists that a GGUF file carries."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTROL = 3  # GGUF's token type of a special token


def write_tokenizer(
    folder: Path,
    *,
    tokens: Sequence[str],
    token_types: Sequence[int],
    merges: Sequence[str],
    chat_template: str,
    special_ids: Mapping[str, int],
    max_positions: int,
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`.

    `tokens[i]` is the text of id i, `merges` are pairs joined by a blank in order of priority, and
    `special_ids` maps `bos`, `eos` and `pad` to ids. Digits are single tokens, as SmolLM's are.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, right = merge.split(" ", 1)
        pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, token_types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": max_positions,
        "chat_template": chat_template,
        "unk_token": tokens[0],
    }
    settings |= {f"{role}_token": tokens[index] for role, index in special_ids.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
