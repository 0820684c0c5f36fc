"""Textual inversion files (Gal et al. 2022, arXiv:2208.01618): new words of a text encoder.

A word of n vectors takes n consecutive positions of a prompt: the token "word" is followed by
"word_1", "word_2" ... Their numbers follow the vocabulary.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import make_conditioner
from ldm_jax.conditioning.tokenizers import tokens_of_word
from ldm_jax.conditioning.words import section_of
from ldm_jax.convert.reader.lazy import shown
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.errors import CheckpointError, ConversionError, ReaderError, TargetError
from ldm_jax.io.checkpoint import load_model
from ldm_jax.io.paths import as_path, exists

# Names of the arrays of files for several towers, which are those of a conditioner's towers.
SEVERAL = ("clip_l", "clip_g")
# Of a model directory: its kind, and the name of a sole tower's vectors.
KIND, SOLE = "inversion", "text"
# Names under which a file keeps its vectors without the word.
_UNNAMED = ("*", "emb_params")
_MOST = 75  # vectors of a word: the words of a prompt


class Embedding(NamedTuple):
    """A word and its vectors.

    Attributes:
      word: The word.
      vectors: {name of the tower, "" of a sole one: float32 [n, d]}, with the same n.
    """

    word: str
    vectors: dict[str, np.ndarray]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The entries of the vocabulary, one for each vector."""
        return tokens_of_word(self.word, len(next(iter(self.vectors.values()))))


def read_embedding(file: str | Path, word: str | None = None) -> Embedding:
    """Reads a textual inversion.

    Args:
      file: The .pt of A1111's web UI, or a .bin or .safetensors of diffusers; for Stable Diffusion
        XL the arrays are "clip_l" and "clip_g". Or the model directory of one that was trained
        here.
      word: The word; None: the file's, or the name of the file where it has none.

    Raises:
      ReaderError: The file cannot be read.
      TargetError: It is no textual inversion, or its word cannot be used.
      ConversionError: It holds NaN or infinity.
    """
    file = as_path(file)
    if (file / "config.json").is_file():
        return _trained(file, word)
    with open_checkpoint(file) as checkpoint:
        tensors, named = dict(checkpoint.tensors), None
        if isinstance(checkpoint.tree, dict):
            named = checkpoint.tree.get("name")
        several = bool(tensors) and tensors.keys() <= set(SEVERAL)
        shapes = [tensor.shape for tensor in tensors.values()]
        if not (several or len(tensors) == 1) or not all(len(s) in (1, 2) for s in shapes):
            raise TargetError(
                f"{file} is no textual inversion: it must hold the vectors of one word, and holds"
                f" {len(tensors)} arrays"
            )
        (name, *_) = tensors
        if several:
            vectors = {n: np.atleast_2d(t.numpy()) for n, t in tensors.items()}
        else:
            vectors = {"": np.atleast_2d(tensors[name].numpy())}
            named = name if name not in _UNNAMED else named
    if not all(array.dtype.kind in "fV" for array in vectors.values()):
        raise TargetError(f"{file} is no textual inversion: its numbers are no floats")
    vectors = {name: array.astype(np.float32) for name, array in vectors.items()}
    counts = {len(array) for array in vectors.values()}
    if len(counts) != 1 or not 1 <= min(counts) <= _MOST or not all(map(np.size, vectors.values())):
        raise TargetError(
            f"{file} is no textual inversion: it must hold 1 to {_MOST} vectors, the same number"
            f" for each tower, and holds {sorted(counts)}"
        )
    ConversionError.check(
        str(file),
        not_finite=(n or "vectors" for n, a in vectors.items() if not np.isfinite(a).all()),
    )
    chosen = word if word is not None else named if isinstance(named, str) and named else file.stem
    if not re.fullmatch(r"[!-~\u00a1-\uffff]{1,100}", chosen) or not chosen.isprintable():
        raise TargetError(
            f"{file}: {shown(chosen)} is no single word; name it: --embedding WORD=FILE"
        )
    return Embedding(chosen, vectors)


def _trained(folder: Path, word: str | None) -> Embedding:
    """Reads the model directory of a textual inversion."""
    try:
        config, params = load_model(folder)
    except CheckpointError as error:
        raise ReaderError(str(error)) from None
    return embedding_of(config, params, word)


def embedding_of(
    config: Mapping[str, Any], params: Mapping[str, Any], word: str | None = None
) -> Embedding:
    """Returns the word of a textual inversion that was trained here.

    Raises:
      TargetError: The model is none.
    """
    if config.get("kind") != KIND:
        raise TargetError(f"a {config.get('kind')} is no textual inversion")
    vectors = {
        "" if name == SOLE else name: np.asarray(rows).astype(np.float32)
        for name, rows in params["vectors"].items()
    }
    return Embedding(config["word"] if word is None else word, vectors)


def add_embeddings(
    config: Mapping[str, Any], params: Mapping[str, Any], embeddings: Iterable[Embedding]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (config, parameters) of a model whose vocabulary has the words of embeddings.

    Args:
      config: The config of the model.
      params: Its parameters by part.
      embeddings: The words.

    Raises:
      TargetError: The model has no text encoder that takes words, or one of other widths.
    """
    new: dict[str, Any] = json.loads(json.dumps(config))  # its sections are changed below
    params = dict(params)
    for embedding in embeddings:
        fields = new.get("conditioner", {"kind": "none"})
        towers = make_conditioner(fields, jnp.float32).towers
        if not towers or not all(hasattr(tower, "added_tokens") for tower in towers.values()):
            raise TargetError("--embedding needs a model with a text encoder")
        if towers.keys() != embedding.vectors.keys():
            found, expected = (
                " and ".join(name or "one text encoder" for name in part)
                for part in (embedding.vectors, towers)
            )
            raise TargetError(
                f"{embedding.word} is an embedding for another base model: it is for {found}, this"
                f" model has {expected}"
            )
        for name, tower in towers.items():
            vocabulary = tower.tokenizer.get_vocab()
            taken = {*tower.added_tokens, *vocabulary}
            if (twice := next((t for t in embedding.tokens if t in taken), None)) is not None:
                raise TargetError(
                    f"the word {shown(twice)} is in the vocabulary already; name it otherwise:"
                    " --embedding WORD=FILE"
                )
            if len(vocabulary) != tower.module.vocab_size:
                raise TargetError(
                    f"the text encoder's table has {tower.module.vocab_size} rows, its vocabulary"
                    f" {len(vocabulary)} entries: no word can be added"
                )
            section, whole = section_of(fields, name), params["conditioner"]
            changes, own = extended(section, whole[name] if name else whole, embedding, name)
            section.update(changes)
            params["conditioner"] = {**whole, name: own} if name else own
    return new, params


def extended(
    section: Mapping[str, Any], tower: Mapping[str, Any], embedding: Embedding, name: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (changed fields, parameters) of a text tower with the rows of new tokens.

    Args:
      section: The tower's section of the config.
      tower: Its parameters.
      embedding: The word.
      name: The tower's name in the embedding.

    Raises:
      TargetError: The vectors have another width than the tower.
    """
    text: Any = make_conditioner({"kind": "clip", **section}, jnp.float32)
    old, vectors = tower[text.table]["embedding"], embedding.vectors[name]
    if old.shape[1] != vectors.shape[1]:
        raise TargetError(
            f"{embedding.word} is an embedding for another base model: its vectors have"
            f" {vectors.shape[1]} entries, this model's {old.shape[1]}"
        )
    rows = np.concatenate([np.asarray(old), vectors.astype(old.dtype)])
    return text.extended_fields(embedding.tokens), {**tower, text.table: {"embedding": rows}}


def split_word(text: str) -> tuple[str, str | None]:
    """Splits "WORD=FILE" into (FILE, WORD); without a word it is None."""
    word, equals, file = text.partition("=")
    # A path may have an equals sign, too.
    return (file, word) if equals and file and not exists(text) else (text, None)
