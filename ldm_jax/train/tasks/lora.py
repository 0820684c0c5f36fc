"""LoRA: low-rank factors of a frozen latent diffusion model (arXiv:2106.09685)."""

import dataclasses
from typing import Any, Self

import jax

from ldm_jax.errors import ConfigError
from ldm_jax.train import adapters
from ldm_jax.train.tasks.frozen import FrozenModelTask

# Sections of a model's config that its LoRA needs: layers are named by them.
_NAMING = ("unet", "conditioner")
ATTENTION = r"^unet/.*/attn\d/to_(q|k|v|out)$"


@dataclasses.dataclass(frozen=True, eq=False)
class LoraTask(FrozenModelTask):
    """Trains the factors of some layers of the UNet and the text encoder.

    Attributes:
      targets: Paths of the kernels that have factors.
    """

    targets: tuple[adapters.Path, ...] = ()

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Returns the fields of the factors."""
        return {
            **FrozenModelTask.defaults(),
            "adapter": {
                "rank": 8,
                "alpha": 8.0,  # the product of the factors is multiplied by alpha / rank
                # Regular expressions that choose layers by their paths, see docs/adapters.md.
                "targets": (ATTENTION,),
            },
        }

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Checks rank, alpha and optimiser."""
        super().check_config(config)
        if config.adapter.rank < 1:
            raise ConfigError(f"adapter.rank must be at least 1, not {config.adapter.rank}")
        if not config.adapter.alpha > 0:
            raise ConfigError(f"adapter.alpha must be above 0, not {config.adapter.alpha}")
        if config.optim.kind == "muon":
            raise ConfigError("optim.kind 'muon' has no form for factors: give adamw or adafactor")

    @classmethod
    def from_config(cls, config: Any, weights: bool = True) -> Self:
        """Builds the task and finds the layers that get factors."""
        task = super().from_config(config, weights)
        targets = adapters.find_targets(task.base, config.adapter.targets)
        return dataclasses.replace(task, targets=targets)

    def init(self, key: jax.Array) -> Any:
        """Returns factors whose products are zero."""
        return adapters.init_factors(self.base, self.targets, self.config.adapter.rank, key)

    def whole(self, params: Any, base: Any) -> Any:
        """Returns the model's parameters with the products of the factors added."""
        adapter = self.config.adapter
        return adapters.with_factors(base, params, adapter.alpha / adapter.rank)

    def adopt(self, config: dict[str, Any], params: Any) -> tuple["LoraTask", Any]:
        """Takes over the factors of another run."""
        if config.get("kind") != "lora":
            raise ConfigError(
                f"init: a {config.get('kind')} is no LoRA: give the model directory of a LoRA run,"
                " and the frozen model as model.path"
            )
        for name in ("rank", "alpha"):
            if config[name] != self.config.adapter[name]:
                raise ConfigError(
                    f"init: that LoRA has {name} {config[name]}: set adapter.{name} to it"
                )
        return self, params

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """Exports the factors, with what names them in the files of other programs."""
        adapter = self.config.adapter
        about = {"rank": adapter.rank, "alpha": adapter.alpha, "base": self.config.model.path}
        sections = {name: self.model_config[name] for name in _NAMING if name in self.model_config}
        return {"kind": "lora", **about, **sections}, weights
