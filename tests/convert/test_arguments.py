"""Every argument of the original's classes is honoured or refused by name: docs/arguments.md."""

import re
from pathlib import Path
from typing import Any

import pytest

from ldm_jax.convert.compvis.classifier import TARGET as CLASSIFIER
from ldm_jax.convert.compvis.classifier import noisy_classifier
from ldm_jax.convert.compvis.targets import TARGETS, module_from_config
from ldm_jax.convert.compvis.whole import WHOLE, loss_parts
from ldm_jax.errors import TargetError

pytestmark = pytest.mark.fast

PAGE = (Path(__file__).parents[2] / "docs" / "arguments.md").read_text("utf-8")
ENCODER = "ldm.modules.x_transformer.Encoder"
WRAPPER = "ldm.modules.x_transformer.TransformerWrapper"
# What a class must be given before its other arguments are looked at.
NEEDED: dict[str, dict[str, Any]] = {
    WRAPPER: {"attn_layers": {"target": ENCODER, "params": {"dim": 8, "depth": 1}}},
    ENCODER: {"dim": 8, "depth": 1},
}
UNREAD = ("ldm.modules.ema.LitEma",)  # not a class that a YAML names


def sections() -> dict[str, dict[str, str]]:
    """{class: {argument: what the page says}}."""
    found = {}
    for part in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        name = re.match(r"`([\w.]+)`", part)
        assert name is not None
        rows = re.findall(r"^\| (`.*?`) \| (.*?) \|$", part.split("\n## ")[0], re.MULTILINE)
        found[name[1]] = {
            argument: text for names, text in rows for argument in re.findall(r"`(\w+)`", names)
        }
    return found


SECTIONS = sections()
REFUSED = [
    (cls, argument)
    for cls, rows in SECTIONS.items()
    for argument, text in rows.items()
    if text.startswith("refused")
]


def read(cls: str, **arguments: Any) -> Any:
    """What the reader of a class makes of arguments."""
    params = NEEDED.get(cls, {}) | arguments
    if cls == ENCODER:
        layers = {"target": ENCODER, "params": params}
        wrapper = {"num_tokens": 4, "max_seq_len": 4, "attn_layers": layers}
        return module_from_config(WRAPPER, wrapper)
    if cls == CLASSIFIER:
        return noisy_classifier(params)
    if cls in WHOLE:
        return WHOLE[cls](params)
    if ".losses." in cls and cls not in TARGETS:
        return loss_parts({"target": cls, "params": params})
    return module_from_config(cls, params)


@pytest.mark.parametrize("cls", [cls for cls in SECTIONS if cls not in UNREAD])
def test_the_page_lists_every_argument_that_a_class_knows(cls: str) -> None:
    with pytest.raises(TargetError, match="unknown parameters no_such_option") as error:
        read(cls, no_such_option=1)
    known = re.search(r"\(known: (.*)\)", str(error.value))
    assert known is not None
    # The loss of taming-transformers stands for the shared arguments of both.
    assert set(known[1].split(", ")) == set(SECTIONS[cls])


@pytest.mark.parametrize(("cls", "argument"), REFUSED)
def test_a_refused_argument_is_named(cls: str, argument: str) -> None:
    with pytest.raises(TargetError, match=rf"\b{argument}='another' is not supported"):
        read(cls, **{argument: "another"})


def test_the_page_has_every_class_and_enough_refusals() -> None:
    assert len(SECTIONS) >= 30
    assert len(REFUSED) >= 25
