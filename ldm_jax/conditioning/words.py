"""New words of text encoders: entries behind the vocabularies of a conditioner's towers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ldm_jax.conditioning import make_conditioner


def section_of(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the section of a tower in a conditioner's fields."""
    return fields[name] if name else fields.get("text", fields)


def with_tokens(fields: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """Returns a conditioner's fields whose towers have ``tokens`` behind their vocabularies.

    Raises:
      ValueError: It has no text encoder that takes words, or a word is known already.
    """
    new: dict[str, Any] = json.loads(json.dumps(fields))
    towers = make_conditioner(fields, jnp.float32).towers
    if not towers:
        raise ValueError("the model has no text encoder that takes new words")
    for name, tower in towers.items():
        vocabulary = tower.tokenizer.get_vocab()
        if (twice := next((t for t in tokens if t in vocabulary), None)) is not None:
            raise ValueError(f"{twice!r} is in the vocabulary already: give another word")
        if len(vocabulary) != tower.module.vocab_size:
            raise ValueError(
                f"the text encoder's table has {tower.module.vocab_size} rows, its vocabulary "
                f"{len(vocabulary)} entries: no word can be added"
            )
        section_of(new, name).update(tower.extended_fields(tokens))
    return new
