"""The content of a page. Text is plain text: the template escapes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variant:
    """A way of sampling, by its folder in the gallery and its name for people."""

    key: str
    title: str


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure at the top of a chapter: what, how much, and a remark."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """`note` is shown below the table. The first cell of a row is its heading. `wraps`: cells hold long words, such as
    digests, that may be broken anywhere."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    wraps: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """One prompt's images as data URIs, by way of sampling. `differences` and `figures`: of all but the first way,
    against the first. `links`: to the whole images, relative to the page. `reduced`: whether the data URIs hold
    smaller copies."""

    prompt: str
    seed: int
    width: int  # pixels of the image that was generated
    height: int
    images: Mapping[str, str]
    differences: Mapping[str, str]
    figures: Mapping[str, str]
    links: Mapping[str, str]
    reduced: bool


@dataclass(frozen=True, slots=True)
class Plot:
    """`svg` is inlined as it is; `text` says in words what it shows."""

    title: str
    svg: str
    text: str


@dataclass(frozen=True, slots=True)
class LayerRow:
    """`share`: the layer's SQNR over the best layer's, 0 to 1, for its bar."""

    name: str
    kind: str
    rank: str
    sqnr_db: str
    share: float
    search: str


@dataclass(frozen=True, slots=True)
class ReportSection:
    """One checkpoint against its source. `ways`: the 16-bit model, the checkpoint, then baselines. `warnings`: why the
    figures may not be believed."""

    key: str  # for links; letters, digits and hyphens
    title: str
    verdict: str
    next: str
    warnings: Sequence[str]
    figures: Sequence[Figure]
    ways: Sequence[Variant]
    scores: Table
    missing: Mapping[str, str]
    shown: Sequence[Shown]
    shown_note: str
    plots: Sequence[Plot]
    tables: Sequence[Table]
    layers: Sequence[LayerRow]  # worst first
    recipe: str
    provenance: Table


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    lead: str
    sections: Sequence[ReportSection]
    tables: Sequence[Table]  # after the chapters
    footer: str
