"""The tokenizers of text pipelines, which ship with ldm_jax: a folder's is compared with ours, never used."""

from pathlib import Path
from typing import Any

from ldm_jax.conditioning.tokenizers import bert_tokenizer, clip_tokenizer
from ldm_jax.convert.diffusers.components import read_json
from ldm_jax.errors import TargetError

TOKENIZERS = {"bert": bert_tokenizer, "clip": clip_tokenizer}


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """{entry: token} of a tokenizer folder in any form that transformers has written, or None where there is none of them."""
    if (file := folder / "vocab.json").is_file():
        return read_json(file)
    try:
        if (file := folder / "vocab.txt").is_file():
            return {
                entry: i for i, entry in enumerate(file.read_text(encoding="utf-8").splitlines())
            }
        if (file := folder / "tokenizer.json").is_file():
            tokenizer = read_json(file)
            return tokenizer["model"]["vocab"] | {
                added["content"]: added["id"] for added in tokenizer["added_tokens"]
            }
    except (OSError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise TargetError(f"{file} cannot be read: {type(error).__name__} {error}") from None
    return None


def check_vocabulary(folder: Path, kind: str) -> None:
    """TargetError where the tokenizer of a folder would read prompts otherwise than ours, which a conditioner of this ``kind`` uses."""
    theirs, ours = read_vocabulary(folder), TOKENIZERS[kind]().get_vocab()
    if theirs is not None and theirs != ours:
        many = f"{len(theirs)} entries" if len(theirs) != len(ours) else "other entries"
        raise TargetError(
            f"{folder}: its vocabulary is not the one that ldm_jax ships ({len(ours)} entries) but has {many}; it is not supported"
        )


def save_tokenizer(folder: Path, kind: str, module: Any) -> None:
    """Writes our tokenizer as transformers loads it, for prompts as long as ``module`` takes them."""
    tokenizer = TOKENIZERS[kind]()
    length = module.max_seq_len if kind == "bert" else module.max_position_embeddings
    before, tokenizer.model_max_length = tokenizer.model_max_length, length
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.model_max_length = before  # it is shared
