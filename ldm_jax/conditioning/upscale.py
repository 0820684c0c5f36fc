"""Text and a noisy small picture together: Stable Diffusion's x4 upscaler.

The small picture is concatenated with noise of a level that is also the vector condition (Ho et
al. 2022, arXiv:2106.15282, conditioning augmentation).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.base import Cond, Conditioner, Names, RowCondition
from ldm_jax.conditioning.hybrid import BesideText, text_of
from ldm_jax.conditioning.pictures import Canvas, Geometry, small_canvas
from ldm_jax.conditioning.small_picture import RowSmallPicture
from ldm_jax.diffusion.schedule import Schedule, make_schedule
from ldm_jax.errors import RequestError

LEVEL = 20  # of the noise, where the request gives none


@lru_cache(maxsize=4)
def schedule_of(kind: str, timesteps: int, start: float, end: float) -> Schedule:
    """Returns the schedule of a small picture's noise."""
    return make_schedule(kind, timesteps, start, end)


def noisy(schedule: Schedule, pictures: Any, levels: Any, noise: Any) -> np.ndarray:
    """Adds ``noise`` of ``levels`` [b] to pictures [b, h, w, 3] in [-1, 1]."""
    a = np.asarray(schedule.sqrt_alphas_cumprod)[levels].reshape(-1, 1, 1, 1)
    s = np.asarray(schedule.sqrt_one_minus_alphas_cumprod)[levels].reshape(-1, 1, 1, 1)
    return (a * pictures + s * noise).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RowUpscale(RowCondition):
    """The noisy small picture of a row with its noise level, float32 [h, w, 4].

    The level, the last channel, is drawn from 0 to ``max_noise_level`` - 1; ``schedule`` has the
    arguments of `schedule_of`.
    """

    size: tuple[int, int]
    max_noise_level: int
    schedule: tuple[Any, ...]
    kinds: tuple[str, ...] = ("bicubic",)
    column = ""

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the picture, about [-1, 1], and the level."""
        small = RowSmallPicture(self.size, self.kinds)(row, image, view, rng)
        level, noise = rng.integers(self.max_noise_level), rng.standard_normal((1, *small.shape))
        picture = noisy(schedule_of(*self.schedule), small[None] / 127.5 - 1, [level], noise)[0]
        return np.concatenate([picture, np.full((*self.size, 1), level, np.float32)], axis=-1)

    def draw(self, images: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Enlarges the small pictures, pixel by pixel."""
        small = ((values[..., :3] + 1) * 127.5).clip(0, 255).round().astype(np.uint8)
        return RowSmallPicture(self.size, self.kinds).draw(images, small)


@dataclasses.dataclass(frozen=True)
class TextUpscale(BesideText):
    """Text as the context, a noisy small picture concatenated, and its noise level as the class.

    Encoded are {"text", "picture", "level"}. Guidance leads away from another text, with the same
    picture and level; only the text is dropped in training.

    Attributes:
      size: Height and width of the small picture, which are those of the latents.
      max_noise_level: The noise levels that the model knows.
      beta_schedule, timesteps, linear_start, linear_end: The schedule of the noise.
    """

    size: tuple[int, int] = (128, 128)
    max_noise_level: int = 350
    beta_schedule: str = "linear"
    timesteps: int = 1000
    linear_start: float = 1e-4
    linear_end: float = 2e-2

    interpolates = False
    edits = False
    gives_vector = True
    options = ("noise_level",)

    def __post_init__(self) -> None:
        if not 1 <= self.max_noise_level <= self.timesteps:
            raise ValueError(
                f"max_noise_level {self.max_noise_level} must be from 1 to {self.timesteps}"
            )

    @property
    def concat_channels(self) -> int:
        """The colours of the small picture."""
        return 3

    @property
    def schedule(self) -> Schedule:
        """The schedule of the small picture's noise."""
        ends = self.linear_start, self.linear_end
        return schedule_of(self.beta_schedule, self.timesteps, *ends)

    @classmethod
    def from_config(cls, dtype: Any = jnp.float32, **fields: Any) -> Conditioner:
        """Builds it from "text", a kind of text with its fields, and its own."""
        built: Any = super().from_config(dtype, **{**fields, "text": text_of(fields, dtype)})
        return built

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what makes the small picture of a row."""
        own = {f.name: fields.get(f.name, f.default) for f in dataclasses.fields(cls)}
        of_schedule = ("beta_schedule", "timesteps", "linear_start", "linear_end")
        schedule = tuple(own[name] for name in of_schedule)
        limits = {"size": tuple(own["size"]), "max_noise_level": own["max_noise_level"]}
        return RowUpscale(**settings, **limits, schedule=schedule)

    def check_size(self, size: tuple[int, int], latent: tuple[int, int]) -> None:
        """The small picture has the size of the latents."""
        if tuple(self.size) != latent:
            raise ValueError(
                f"size is {tuple(self.size)}: latents of pictures of {size} are {latent}"
            )

    def check_request(self, request: Any) -> None:
        """An image is enlarged whole."""
        super().check_request(request)
        if request.image is None:
            raise RequestError("this model enlarges an image: give one")
        if request.mask is not None or request.outpaint is not None:
            raise RequestError("this model enlarges an image: it takes no mask and no outpaint")
        level = request.noise_level
        if level is not None and not 0 <= level < self.max_noise_level:
            raise RequestError(
                f"noise_level must be from 0 to {self.max_noise_level - 1}, not {level}"
            )

    def canvas(self, request: Any, geometry: Geometry) -> Canvas:
        """Returns a canvas of the small pictures' size times the latents' factor."""
        return small_canvas(request.image, geometry)

    def encode_null(self, n: int) -> dict[str, Any]:
        """Returns the empty caption, a grey picture and level 0."""
        picture = np.zeros((n, *self.size, 3), np.float32)
        text = self.text.encode_null(n)
        return {"text": text, "picture": picture, "level": np.zeros(n, np.int32)}

    def null_row(self, encoded: Any = None) -> dict[str, Any]:
        """Returns the empty caption with the picture of ``encoded``."""
        null = self.encode_null(1)
        return null if encoded is None else {**encoded, "text": null["text"]}

    def drop(self, encoded: Any, null: Any, drop: jax.Array) -> Any:
        """Replaces the caption of the rows in ``drop`` [b]; the picture stays."""
        text = self.text.drop(encoded["text"], null["text"], drop)
        return {**encoded, "text": text}

    def from_request(
        self,
        encoded: Any,
        request: Any,
        canvas: Any,
        *,
        seeds: Sequence[int],
        negative: bool = False,
    ) -> dict[str, Any]:
        """Adds the small pictures with noise of each picture's seed."""
        text = encoded["text"] if isinstance(encoded, dict) and "text" in encoded else encoded
        small = canvas.small.astype(np.float32) / 127.5 - 1
        if len(small) not in (1, len(seeds)):
            raise RequestError(
                f"{len(small)} images for {len(seeds)} pictures: give one, or one for each"
            )
        shape = small.shape[1:]
        noise = np.stack([np.random.default_rng(s).standard_normal(shape) for s in seeds])
        level = LEVEL if request.noise_level is None else request.noise_level
        levels = np.full(len(seeds), min(level, self.max_noise_level - 1), np.int32)
        picture = noisy(self.schedule, small, levels, noise)
        return {"text": text, "picture": picture, "level": levels}

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Encodes the text; the picture is concatenated, the level is the class."""
        text = self.text(params, encoded["text"], train=train, rngs=rngs)
        return Cond(text.crossattn, encoded["picture"], encoded["level"])

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes the captions of a batch, beside its noisy pictures and their levels."""
        text = self.text.encode_rows({"caption": raw["caption"]})["encoded"]
        picture, level = raw["condition"][..., :3], raw["condition"][:, 0, 0, 3].astype(np.int32)
        return {"encoded": {"text": text, "picture": picture, "level": level}}
