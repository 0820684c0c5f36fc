"""Textual inversion: vectors of a new word of a frozen text encoder (arXiv:2208.01618)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import Conditioner, make_conditioner
from ldm_jax.conditioning.tokenizers import tokens_of_word
from ldm_jax.conditioning.words import with_tokens
from ldm_jax.errors import ConfigError, DataError
from ldm_jax.train.tasks.base import plain
from ldm_jax.train.tasks.frozen import FrozenModelTask

KIND = "inversion"
SOLE = "text"  # the name of a sole tower's vectors


@dataclasses.dataclass(frozen=True, eq=False)
class InversionTask(FrozenModelTask):
    """Trains the vectors that a new word has in the tables of the text encoders.

    Attributes:
      initial: {name of the tower, `SOLE` of a sole one: float32 [n, d]}, the vectors to start from.
    """

    initial: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Returns the fields of the word."""
        return {
            **FrozenModelTask.defaults(),
            "adapter": {
                "word": "",  # one that the vocabulary lacks, such as "<toy>"
                "vectors": 1,  # tokens of a prompt that the word takes
                # A word that means about the same, whose first vector is the start of all; "": the
                # mean of the vocabulary.
                "initial": "",
            },
        }

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Checks the word."""
        super().check_config(config)
        adapter = config.adapter
        if not 1 <= adapter.vectors <= 75:
            raise ConfigError(f"adapter.vectors must be from 1 to 75, not {adapter.vectors}")
        if not adapter.word or len(adapter.word.split()) != 1 or not adapter.word.isprintable():
            raise ConfigError(
                f"adapter.word {adapter.word!r}: give a single word that is new, such as '<toy>'"
            )

    @classmethod
    def with_additions(cls, config: Any, model: dict[str, Any]) -> dict[str, Any]:
        """Returns the model's config with the word in its vocabulary."""
        tokens = tokens_of_word(config.adapter.word, config.adapter.vectors)
        try:
            return {**model, "conditioner": with_tokens(model["conditioner"], tokens)}
        except ValueError as error:
            raise ConfigError(f"adapter.word: {error}") from None

    @classmethod
    def from_config(cls, config: Any, weights: bool = True) -> Self:
        """Builds the task and looks up the vectors to start from."""
        task = super().from_config(config, weights)
        known = make_conditioner(plain(config.model)["conditioner"], jnp.float32)
        initial = {
            name or SOLE: _initial(known, name, task.base["conditioner"], config.adapter)
            for name in known.towers
        }
        return dataclasses.replace(task, initial=initial)

    def check_rows(self, loader: Any) -> None:
        """The captions must have the word."""
        super().check_rows(loader)
        word, captions, source = self.config.adapter.word, loader.captions, loader.source
        if getattr(source, "window", 0) or captions is None:
            return
        without = sum(word.lower() not in captions(row).lower() for row in source.rows)
        if without == len(source.rows):
            raise DataError(
                f"{source.path}: no caption has the word {word!r}: set data.caption, as in "
                f"'a picture of {word}'"
            )

    def init(self, key: jax.Array) -> Any:
        """Returns the vectors to start from."""
        return {"vectors": {name: jnp.asarray(rows) for name, rows in self.initial.items()}}

    def whole(self, params: Any, base: Any) -> Any:
        """Returns the model's parameters with the vectors behind the rows of its tables."""
        conditioner = base["conditioner"]
        for name, tower in self.model.conditioner.towers.items():
            own = conditioner[name] if name else conditioner
            rows, table = params["vectors"][name or SOLE], own[tower.table]["embedding"]
            longer = jnp.concatenate([table.astype(rows.dtype), rows])
            own = {**own, tower.table: {"embedding": longer}}
            conditioner = {**conditioner, name: own} if name else own
        return {**base, "conditioner": conditioner}

    def adopt(self, config: dict[str, Any], params: Any) -> tuple["InversionTask", Any]:
        """Takes over the vectors of another run."""
        if config.get("kind") != KIND:
            raise ConfigError(
                f"init: a {config.get('kind')} is no textual inversion: give the model directory "
                "of such a run, and the frozen model as model.path"
            )
        return self, params

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """Exports the word and its vectors."""
        about = {"word": self.config.adapter.word, "base": self.config.model.path}
        return {"kind": KIND, **about}, weights


def _initial(known: Conditioner, name: str, params: Any, adapter: Any) -> Any:
    """Returns the vectors float32 [n, d] that a tower's word starts from, or their shape.

    Args:
      known: The conditioner without the word.
      name: The tower's.
      params: The conditioner's parameters.
      adapter: The config's.
    """
    tower = known.towers[name]
    table = (params[name] if name else params)[tower.table]["embedding"]
    if isinstance(table, jax.ShapeDtypeStruct):
        return np.zeros((adapter.vectors, table.shape[1]), np.float32)
    table = np.asarray(table).astype(np.float32)
    if not adapter.initial:
        return np.repeat(table.mean(0, keepdims=True), adapter.vectors, axis=0)
    tokens = tower.tokenizer(adapter.initial, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ConfigError(f"adapter.initial {adapter.initial!r} has no token: give another word")
    return np.repeat(table[tokens[:1]], adapter.vectors, axis=0)
