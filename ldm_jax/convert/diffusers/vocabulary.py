"""The tokenizer of a text pipeline: the vocabulary ships with ldm_jax, the rest is the folder's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_jax.conditioning.tokenizers import bert_tokenizer, clip_tokenizer
from ldm_jax.convert.diffusers.components import read_json
from ldm_jax.convert.diffusers.configs import Config
from ldm_jax.errors import TargetError

TOKENIZERS = {"bert": bert_tokenizer, "clip": clip_tokenizer}


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Returns {entry: token} of a tokenizer folder in any form of transformers, or None."""
    try:
        if (file := folder / "vocab.json").is_file():
            return read_json(file)
        if (file := folder / "vocab.txt").is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            return {entry: i for i, entry in enumerate(lines)}
        if (file := folder / "tokenizer.json").is_file():
            tokenizer = read_json(file)
            added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
            return tokenizer["model"]["vocab"] | added
    except (OSError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise TargetError(f"{folder} cannot be read: {type(error).__name__} {error}") from None
    return None


def read_tokenizer(folder: Path, kind: str, section: Mapping[str, Any]) -> Config:
    """Returns the fields of a conditioner for which a folder's tokenizer differs from ours.

    Args:
      folder: The tokenizer folder; without one the shipped tokenizer is meant.
      kind: The kind of the conditioner.
      section: Its config.

    Returns:
      "pad_token_id" where it pads with another token, "added_tokens" in the order of their ids.

    Raises:
      TargetError: The vocabulary, or something that the conditioner cannot do, is another.
    """
    if not folder.is_dir():
        return {}
    ours = TOKENIZERS[kind]()
    theirs = read_vocabulary(folder)
    vocabulary = ours.get_vocab()
    added: dict[str, int] = {}
    if (file := folder / "added_tokens.json").is_file():
        added |= read_json(file)
    if theirs is not None:
        added |= {entry: i for entry, i in theirs.items() if entry not in vocabulary}
    added = {entry: i for entry, i in added.items() if vocabulary.get(entry) != i}
    other = theirs is not None and any(theirs.get(entry) != i for entry, i in vocabulary.items())
    numbers = list(range(len(vocabulary), len(vocabulary) + len(added)))
    if other or sorted(added.values(), key=str) != sorted(numbers, key=str):
        many = len(theirs or added)
        found = f"{many} entries" if many != len(vocabulary) else "other entries"
        raise TargetError(
            f"{folder}: its vocabulary is not the one that ldm_jax ships ({len(vocabulary)}"
            f" entries) but has {found}; it is not supported"
        )
    size = section.get("vocab_size")
    if late := [entry for entry, i in added.items() if size is not None and i >= size]:
        raise TargetError(
            f"{folder}: the added token {late[0]!r} has no row in the text encoder's table of"
            f" {size}; copy the text encoder that was trained with it"
        )
    options = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the later one overrides
        options |= read_json(folder / name) if (folder / name).is_file() else {}
    length = options.get("model_max_length")
    positions = section.get("max_position_embeddings", section.get("max_seq_len"))
    if isinstance(length, int) and positions is not None and length < positions:
        raise TargetError(
            f"{folder}: model_max_length={length} with a text encoder of {positions} positions is"
            " not supported"
        )
    fields: Config = {}
    pad = options.get("pad_token")
    pad = pad.get("content") if isinstance(pad, Mapping) else pad
    if pad is not None and (token := (vocabulary | added).get(pad)) != ours.pad_token_id:
        if token is None:
            raise TargetError(f"{folder}: its pad_token {pad!r} is not in its vocabulary")
        fields["pad_token_id"] = token
    if added:
        fields["added_tokens"] = sorted(added, key=added.__getitem__)
    if fields and kind != "clip":
        raise TargetError(f"{folder}: {', '.join(fields)} of its tokenizer are not supported")
    return fields


def save_tokenizer(folder: Path, conditioner: Any) -> None:
    """Writes the tokenizer of a text conditioner as transformers loads it."""
    tokenizer, pad = conditioner.tokenizer, conditioner.padding
    before, tokenizer.model_max_length = tokenizer.model_max_length, conditioner.max_length
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.model_max_length = before  # it is shared
    if pad != tokenizer.pad_token_id:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            file = folder / name
            content = read_json(file) if file.is_file() else {}
            content["pad_token"] = tokenizer.convert_ids_to_tokens(pad)
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
