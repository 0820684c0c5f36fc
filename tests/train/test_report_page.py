"""The report page of a run: complete, self-contained, safe to open."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ldm_jax.configs.common import base
from ldm_jax.io import png
from ldm_jax.train.page import read_curves, thinned, write_page

pytestmark = pytest.mark.fast


class Balanced(HTMLParser):
    """Collects tags and links, and the text outside of <style>."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run <b>&"
    (folder / "previews").mkdir(parents=True)
    for step in range(0, 60, 10):
        image = np.full((16, 24, 3), step, np.uint8)
        png.save_png(folder / "previews" / f"{step:07d}.png", image)
    records = [
        {"step": s, "part": "train", "loss": 1000.0 / s, "images_per_second": 20.0}
        for s in range(1, 1001)
    ]
    records.append({"step": 500, "part": "validation", "loss": 3.0, "loss_simple_q1": float("nan")})
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 1001, "par')
    return folder


def test_the_page_has_everything_and_needs_nothing(run):
    config = base("diffusion")
    config.update(steps=1000, batch_size=4)
    config.data.path = "<script>alert(1)</script>"
    page = write_page(run, config, {"data": config.data.path}).read_text()
    parsed = Balanced()
    parsed.feed(page)
    assert "script" not in parsed.tags
    assert parsed.links
    assert all(link.startswith("data:image/webp;base64,") for link in parsed.links)
    assert not re.search(r"url\(|@import|https?://", page.replace("http://www.w3.org", ""))
    assert parsed.tags.count("img") == 4
    assert parsed.tags.count("figure") == 2  # the metric without a finite value has none
    for text in ("run <b>&", "20.0 (median)", "3:20", '"batch_size": 4', "jaxlib", "Step 50"):
        assert text in parsed.text, text
    assert "logarithmic" in page


def test_a_run_without_metrics_or_previews_has_a_page(tmp_path):
    config = base("autoencoder")
    page = write_page(tmp_path, config, {}).read_text()
    assert "<svg" not in page
    assert "Config" in page


def test_long_curves_keep_their_mean_and_their_end(run):
    points = read_curves(run / "metrics.jsonl")["loss"]["train"]
    few = thinned(points, 50)
    assert len(few) == 50
    assert few[-1][0] == 1000
    assert np.mean([y for _, y in few]) == pytest.approx(np.mean([y for _, y in points]))
