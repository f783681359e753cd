"""The HTML report: one file that loads nothing, in which hostile text stays text."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from svdq_cli.evaluation.image_store import keep_image, open_image_store
from svdq_cli.evaluation.page import render_page, show_images
from svdq_cli.evaluation.page.images import SIDES, data_uri, difference_map
from tests.evaluation.page_sample import HOSTILE, WAYS, image_store_of, page_of


class Outline(HTMLParser):
    """Tags with their attributes, in order, and whether every element was closed where it should be."""

    VOID = frozenset({"meta", "img", "input", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def outline_of(html: str) -> Outline:
    outline = Outline()
    outline.feed(html)
    outline.close()
    assert outline.open == []
    return outline


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_page(page_of(image_store_of(tmp_path_factory.mktemp("page") / "run", 2), HOSTILE, count=2))


def test_the_page_is_well_formed_and_hostile_text_makes_no_element(hostile: str):
    outline = outline_of(hostile)
    assert len(outline.all("script")) == 1
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert HOSTILE.strip() in "".join(outline.text)
    assert all((image.get("src") or "").startswith("data:image/webp;base64,") for image in outline.all("img"))


def test_the_page_loads_nothing(hostile: str):
    outline = outline_of(hostile)
    loading = {"src", "href", "srcset", "poster", "data", "action", "background"}
    targets = [
        value or ""
        for tag, attributes in outline.tags
        for name, value in attributes.items()
        if name.split(":")[-1] in loading and tag != "a"
    ]
    assert targets
    assert all(target.startswith(("data:image/", "#")) for target in targets)
    # links load nothing until they are followed, and lead to the report's own folder
    links = [attributes["href"] or "" for tag, attributes in outline.tags if tag == "a"]
    assert all(re.fullmatch(r"#\w+|[\w%./-]+\.png", link) for link in links)
    style = hostile[hostile.index("<style>") : hostile.index("</style>")]
    assert not re.search(r"@import|url\(|https?:", style)
    assert outline.all("link") == []


def test_the_security_policy_lets_only_the_pages_own_script_run(hostile: str):
    import hashlib

    (policy,) = (tag["content"] or "" for tag in outline_of(hostile).all("meta") if "http-equiv" in tag)
    script = hostile[hostile.index("<script>") + 8 : hostile.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_every_image_has_words_and_every_control_a_label(hostile: str):
    outline = outline_of(hostile)
    assert all(image["alt"] for image in outline.all("img"))
    ranges = [tag for tag in outline.all("input") if tag["type"] == "range"]
    assert len(ranges) == 4  # two chapters of two prompts
    assert all(tag["aria-label"] for tag in ranges)
    assert outline.all("html")[0]["lang"] == "en"


def test_small_images_are_shown_bit_for_bit_and_large_ones_bounded():
    small = Image.linear_gradient("L").resize((96, 96)).convert("RGB")
    assert decoded(data_uri(small)).tobytes() == small.tobytes()
    large = decoded(data_uri(Image.linear_gradient("L").resize((1024, 768)).convert("RGB")))
    assert large.size == (512, 384)


def test_images_stop_at_the_budget(tmp_path: Path):
    image_store = image_store_of(tmp_path / "run", 6)  # so small that no size makes them smaller
    figures = [{way.key: "" for way in WAYS[1:]}] * 6
    prompts = [(i, "a prompt", i) for i in range(6)]
    everything = show_images(image_store, WAYS, prompts, figures, page_folder=tmp_path)
    bytes_of_one = sum(map(len, (*everything[0].images.values(), *everything[0].differences.values())))
    budget = 3 * bytes_of_one + bytes_of_one // 2
    some = show_images(image_store, WAYS, prompts, figures, page_folder=tmp_path, budget=budget)
    assert (len(everything), len(some)) == (6, 3)


def test_images_are_reduced_before_any_is_left_out(tmp_path: Path):
    image_store = open_image_store(tmp_path / "run", {}, ["a prompt"], overwrite=False)
    for way in WAYS:
        keep_image(image_store, way.key, 0, Image.effect_noise((600, 600), 60))
    arguments = (image_store, WAYS, [(0, "a prompt", 0)], [{way.key: "" for way in WAYS[1:]}])
    (large,) = show_images(*arguments, page_folder=tmp_path)
    budget = sum(map(len, (*large.images.values(), *large.differences.values()))) // 2
    (reduced,) = show_images(*arguments, page_folder=tmp_path, budget=budget)
    assert decoded(large.images["16bit"]).size == (512, 512)
    assert decoded(reduced.images["16bit"]).width in SIDES[1:]
    assert (reduced.width, reduced.height) == (600, 600)  # what was drawn


def test_a_difference_map_is_dark_where_images_agree_and_bright_where_they_do_not():
    first = Image.new("RGB", (4, 4), (100, 100, 100))
    other = first.copy()
    other.putpixel((1, 2), (100, 60, 100))
    other.putpixel((2, 2), (100, 100, 104))
    brightness = difference_map(first, other).convert("L")
    values = torch.frombuffer(bytearray(brightness.tobytes()), dtype=torch.uint8).reshape(4, 4)
    assert values[2, 1] > values[2, 2] > 20 > values[0, 0]
    assert values.unique().numel() == 3


def decoded(uri: str) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return image.convert("RGB")
