"""What the training of a few parameters beside a frozen latent diffusion model shares."""

import dataclasses
import importlib
import logging
from typing import Any, ClassVar, Self

import jax
from ml_collections import ConfigDict

from ldm_jax.errors import CheckpointError, ConfigError
from ldm_jax.io.checkpoint import find_model, load_model, read_config
from ldm_jax.models.build import DTYPES, build, init_params
from ldm_jax.train import adapters
from ldm_jax.train.tasks.base import check_choices, plain
from ldm_jax.train.tasks.diffusion import DiffusionTask, first_stage_shapes

LOG = logging.getLogger(__name__)

# What config.json holds beside the model.
_ABOUT = ("format", "trained_steps")


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenModelTask(DiffusionTask):
    """Trains a few parameters beside a latent diffusion model that stays as it is.

    The model is that of the directory ``model.path``, whose config becomes "model".

    Attributes:
      base: The parameters of the model, without the first stage, or their shapes.
    """

    base: Any = None

    free_settings: ClassVar[tuple[str, ...]] = ("model.like",)

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Returns the fields of a diffusion stage, and where the model comes from."""
        return {
            **DiffusionTask.defaults(),
            # A model directory. ``like`` names the config of this package whose model ldm-plan
            # takes where the directory does not exist yet.
            "model": {"path": "", "like": "", "sampling": {}},
            # How the frozen matrices are kept: "float32" or "bfloat16".
            "base_dtype": "float32",
        }

    @classmethod
    def complete_config(cls, config: Any) -> None:
        """Fills in "model" from the model directory; ``model.sampling`` may differ from it."""
        given = plain(config.model)
        path, like, own = given.pop("path"), given.pop("like"), given.pop("sampling")
        saved = _read_base(path, like)
        for name, value in given.items():
            if saved.get(name) != value:
                raise ConfigError(f"model.{name} is that of the model in {path}: leave it out")
        config.model = ConfigDict(
            {**saved, "sampling": {**saved.get("sampling", {}), **own}, "path": path, "like": like}
        )

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Checks the choices among names."""
        super().check_config(config)
        check_choices(config, {"base_dtype": ("float32", "bfloat16")})
        if config.loss.learn_logvar:
            raise ConfigError("loss.learn_logvar: the model is frozen: leave it False")

    @classmethod
    def from_config(cls, config: Any, weights: bool = True) -> Self:
        """Builds the task around the model of ``model.path``."""
        model = plain(config.model)
        path, _ = model.pop("path"), model.pop("like")
        if weights:
            _, base = load_model(find_model(path))
            first_stage = base.pop("first_stage", None)
            base.pop("logvar", None)
        else:
            _, first_stage = first_stage_shapes(model["first_stage"], None)
            own = build(model, None, None)
            base = jax.eval_shape(lambda: init_params(own, jax.random.key(0)))
        task = cls.of_model(config, cls.with_additions(config, model), first_stage)
        base = adapters.in_storage_type(base, DTYPES[config.base_dtype])
        return dataclasses.replace(task, base={"conditioner": {}, **base})

    @classmethod
    def with_additions(cls, config: Any, model: dict[str, Any]) -> dict[str, Any]:
        """Returns the config of the model with what is trained."""
        return model

    @property
    def frozen(self) -> dict[str, Any]:
        """The first stage, the null condition of one row, and the model."""
        return {**super().frozen, "base": self.base}

    def whole(self, params: Any, base: Any) -> Any:
        """Returns the model's parameters with those that are trained; pure.

        Args:
          params: Of `init`.
          base: The model's.
        """
        raise NotImplementedError

    def loss(
        self, params: Any, frozen: Any, batch: Any, step: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the loss of one batch, as the model's own training does."""
        return super().loss(self.whole(params, frozen["base"]), frozen, batch, step, train)

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any], columns: int = 8) -> Any:
        """Returns samples of the model with what is trained."""
        whole = jax.jit(self.whole)(weights, frozen["base"])
        return super().preview(whole, frozen, raw, columns)

    def sampling_model(self) -> None:
        """None: a plan of sampling is that of the model itself."""


def _read_base(path: str, like: str) -> dict[str, Any]:
    """Returns the config of a model directory, or the model of the config ``like``."""
    if not path:
        raise ConfigError("model.path is missing: give the directory of the model to adapt")
    try:
        saved = read_config(find_model(path))
    except CheckpointError:
        if not like:
            raise
        LOG.warning("there is no model in %s: its shapes are those of the config %s", path, like)
        try:
            module = importlib.import_module(f"ldm_jax.configs.{like}")
        except ModuleNotFoundError:
            raise ConfigError(f"model.like {like!r} is no config of the package") from None
        saved = plain(module.get_config().model)
        for name in ("path", "frozen"):
            saved["first_stage"].pop(name, None)
            saved["conditioner"].pop(name, None)
    else:
        if saved.get("kind") != "latent_diffusion":
            raise ConfigError(
                f"model.path {path} is a {saved.get('kind')}: give a latent diffusion model"
            )
    return {name: value for name, value in saved.items() if name not in _ABOUT}
