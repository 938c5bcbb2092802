"""What a named encoder is, as data, and how its name is found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dfx.encoders.spec import Library, Precision, Triple

TOLERANCE = 0.1
"""By how much patches may be coarser or finer than an encoder was trained for, before that is worth a warning."""


@dataclass(frozen=True)
class Card:
    """What users should know of an encoder before they choose it, and what it takes to build it."""

    name: str
    """What `load_encoder` takes."""
    library: Library
    """What builds it."""
    hub: str | None
    """Repository of the weights on the Hugging Face hub; None: not there, see `page`."""
    input_size: tuple[int, int]
    """(rows, columns) of the pixels that the network sees."""
    mpp: float | None
    """Microns per pixel that it was trained at; None: not trained on slides, or not published."""
    mean: Triple
    """Subtracted from RGB in [0, 1]."""
    std: Triple
    """Divides what is left."""
    dim: int
    """Numbers per patch."""
    pooling: str
    """How the network's maps or tokens become one vector: cls, mean, cls+mean, or the network's own."""
    precision: Precision
    """In which it computes on a GPU unless told otherwise; on a CPU that is float32."""
    license: str
    """Of the weights, as their source states it."""
    gated: bool
    """Whether the weights can be downloaded only after accepting terms."""
    mpp_range: tuple[float, float] | None = None
    """Finest and coarsest that it was trained at, where that is more than one."""
    interpolation: str = "bicubic"
    """How patches of another size are resized."""
    resize: tuple[int, int] | None = None
    """(rows, columns) of patches before `input_size` is cut out of their middle; None: nothing is cut off."""
    architecture: str | None = None
    """The library's name for its layers; None: timm's model of the same name as the card."""
    build: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    """What the library's constructor is given besides."""
    files: tuple[str, ...] = ()
    """What the weights' file is called; (): as the library names it."""
    shares: str | None = None
    """Another card's name, of the same weights."""
    code: bool = False
    """Whether building it runs code of its repository."""
    page: str = ""
    """Where the weights are described when they are not on the hub."""

    @property
    def source(self) -> str:
        """Library and identifier of the weights."""
        return f"{self.library}:{self.hub or self.page}"

    @property
    def home(self) -> str:
        """Where the weights and their terms are described."""
        return f"https://huggingface.co/{self.hub}" if self.hub else self.page


ALIASES = {
    # TIAToolbox
    "uni2": "uni2-h",
    "kaiko": "kaiko-vit-l14",
    # TRIDENT; its other names differ in case and separators only
    "univ1": "uni",
    "univ2": "uni2-h",
    "conchv1": "conch",
    "gigapath": "prov-gigapath",
    # papers and other tools
    "midnight": "midnight-12k",
    "provgigapathflash": "gigapath-flash",
    "lunitdino": "lunit-vit-s16",
    "lunitdino8": "lunit-vit-s8",
    "hipt": "hipt-256",
}


def plain(name: str) -> str:
    """Give a name without case and separators, so that `H-optimus-0` and `hoptimus0` are one."""
    return re.sub(r"[-_]", "", name).lower()


def find(name: str) -> Card | None:
    """Give the card of a name or alias, whatever its case and separators."""
    from dfx.encoders.catalogue import CARDS

    by_name = {plain(card.name): card for card in CARDS}
    key = plain(name)
    return by_name.get(plain(ALIASES.get(key, key)))


def list_encoders() -> tuple[Card, ...]:
    """Give the cards of the named encoders. Every other timm model name works too."""
    from dfx.encoders.catalogue import CARDS

    return CARDS


def unusual_mpp(name: str, mpp: float | None) -> str:
    """Say that patches are far from what a named encoder was trained for; "" where they are not, or nobody knows."""
    card = find(name)
    if card is None or card.mpp is None or mpp is None:
        return ""
    finest, coarsest = card.mpp_range or (card.mpp, card.mpp)
    if finest * (1 - TOLERANCE) <= mpp <= coarsest * (1 + TOLERANCE):
        return ""
    trained = f"{finest:g}" if finest == coarsest else f"{finest:g} to {coarsest:g}"
    return (
        f"patches have about {mpp:.3g} mpp, but {card.name} was trained at {trained}: "
        f"its features may mean less; ask for resolution={card.mpp:g}, units='mpp'."
    )
