"""What a source's attention becomes: each recipe is data, from which the stages of a conversion read what they do."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from subquad.convert.sites import PROJECTIONS, Site
from subquad.layers.registry import unknown_name
from subquad.mixers.cores import AttentionCore, FeatureMapCore, SoftmaxCore
from subquad.mixers.liger import LigerCore
from subquad.mixers.lolcats import LolcatsCore


@dataclass(frozen=True)
class Transfer:
    """Layer-wise training of a core's own parameters, until it attends as the source does.

    Attributes:
        loss: ``"output"``: 1000 times the mean squared difference of the heads' outputs (LoLCATs); ``"weights"``: cross
            entropy of the attention weights (Hedgehog).
        learning_rate: of AdamW, without weight decay.
    """

    loss: str
    learning_rate: float


@dataclass(frozen=True)
class Adapt:
    """Training of the whole model by next tokens, through low-rank additions to the projections of attention.

    Attributes:
        projections: which of q, k, v, o are adapted.
        rank, alpha: of LoRA; the addition is ``alpha / rank`` times a product of rank ``rank``.
        learning_rate: of AdamW, without weight decay.
        train_cores: whether the cores' own parameters are trained too.
    """

    projections: tuple[str, ...]
    rank: int
    alpha: int
    learning_rate: float
    train_cores: bool = False

    def __post_init__(self) -> None:
        for name in self.projections:
            if name not in PROJECTIONS:
                raise unknown_name("projection", name, PROJECTIONS)


@dataclass(frozen=True)
class Recipe:
    """A conversion.

    Attributes:
        name: as given to ``subquad convert --to``.
        summary: what attention becomes, in a line.
        core: ``(site, **options) -> AttentionCore``.
        options: what ``core`` takes, with its defaults.
        transfer, adapt: the stages; None: left out.
        encoders: whether it serves models in which tokens see each other in both directions.
    """

    name: str
    summary: str
    core: Callable[..., AttentionCore] = field(repr=False)
    transfer: Transfer | None
    adapt: Adapt | None
    encoders: bool = False

    @property
    def options(self) -> Mapping[str, Any]:
        parameters = inspect.signature(self.core).parameters.values()
        return MappingProxyType({p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY})

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options, with those given.

        Raises:
            ValueError: an option that this recipe does not have.
        """
        for name in options:
            if name not in self.options:
                raise unknown_name(f"option of recipe {self.name!r}", name, self.options)
        return {**self.options, **options}

    def build(self, site: Site, options: Mapping[str, Any]) -> AttentionCore:
        """The core for one layer.

        Raises:
            ValueError: a recipe for causal models on an encoder, or an option out of range.
        """
        if not site.causal and not self.encoders:
            raise ValueError(
                f"recipe {self.name!r} is for causal language models; {site.family.name} is an encoder: recipes for "
                f"encoders are {', '.join(name for name, recipe in RECIPES.items() if recipe.encoders)}"
            )
        return self.core(site, **self.checked(options))

    def with_learning_rates(self, transfer: float | None, adapt: float | None) -> "Recipe":
        """With other learning rates; None keeps the recipe's own.

        Raises:
            ValueError: a rate for a stage that the recipe does not have.
        """
        changed = self
        for stage, rate in (("transfer", transfer), ("adapt", adapt)):
            if rate is None:
                continue
            if getattr(self, stage) is None:
                raise ValueError(f"recipe {self.name!r} has no stage {stage!r}")
            changed = dataclasses.replace(
                changed, **{stage: dataclasses.replace(getattr(self, stage), learning_rate=rate)}
            )
        return changed


def _window_of(site: Site, window: int | None) -> int | None:
    """A window, narrowed to the source's own."""
    if site.sliding_window is None:
        return window
    return site.sliding_window if window is None else min(window, site.sliding_window)


def _identity(site: Site) -> AttentionCore:
    return SoftmaxCore(_window_of(site, None))


def _window(site: Site, *, window: int = 64) -> AttentionCore:
    return SoftmaxCore(_window_of(site, window))


def _liger(
    site: Site,
    *,
    recurrence: str = "gla",
    window: int = 64,
    mix: tuple[float, float] = (0.5, 0.5),
    gate: str = "key",
    num_slots: int | None = None,
    learn_mix: bool = False,
) -> AttentionCore:
    return LigerCore(
        site.num_heads,
        site.head_dim,
        recurrence=recurrence,
        window=_window_of(site, window) or window,
        mix=mix,
        gate=gate,
        num_slots=num_slots,
        learn_mix=learn_mix,
    )


def _lolcats(
    site: Site,
    *,
    window: int | None = 64,
    form: str = "sliding",
    feature_dim: int | None = None,
    feature_map: str = "hedgehog_softmax",
    share_kv_maps: bool = False,
    affine: bool = False,
) -> AttentionCore:
    return LolcatsCore(
        site.num_heads,
        site.num_key_value_heads,
        site.head_dim,
        window=None if window is None else _window_of(site, window),
        form=form,
        feature_dim=site.head_dim if feature_dim is None else feature_dim,
        feature_map=feature_map,
        share_kv_maps=share_kv_maps,
        affine=affine,
    )


def _hedgehog(site: Site, *, feature_map: str = "hedgehog_softmax") -> AttentionCore:
    return FeatureMapCore(site.num_heads, site.head_dim, feature_map, causal=site.causal)


def _linear(site: Site, *, feature_map: str = "elu+1") -> AttentionCore:
    return FeatureMapCore(site.num_heads, site.head_dim, feature_map, causal=site.causal)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "liger",
            "a gated recurrence whose gate is the key, and a window of softmax (Lan et al. 2025); no new parameters",
            _liger,
            transfer=None,
            adapt=Adapt(("q", "k", "v"), rank=8, alpha=8, learning_rate=1e-3),
        ),
        Recipe(
            "lolcats",
            "softmax over a window and learnt linear attention before it (Zhang et al. 2025)",
            _lolcats,
            transfer=Transfer("output", learning_rate=1e-2),
            adapt=Adapt(("q", "k", "v", "o"), rank=8, alpha=16, learning_rate=1e-3),
        ),
        Recipe(
            "hedgehog",
            "linear attention whose feature maps learn softmax's weights (Zhang et al. 2024)",
            _hedgehog,
            transfer=Transfer("weights", learning_rate=1e-2),
            adapt=Adapt(("q", "k", "v", "o"), rank=8, alpha=16, learning_rate=1e-3),
            encoders=True,
        ),
        Recipe(
            "linear",
            "linear attention with a fixed feature map (Katharopoulos et al. 2020): a baseline",
            _linear,
            transfer=None,
            adapt=Adapt(("q", "k", "v", "o"), rank=8, alpha=16, learning_rate=1e-3),
            encoders=True,
        ),
        Recipe(
            "window",
            "softmax over the last tokens alone: a baseline",
            _window,
            transfer=None,
            adapt=Adapt(("q", "k", "v", "o"), rank=8, alpha=16, learning_rate=1e-3),
        ),
        Recipe(
            "identity",
            "the attention that it was, through this library: for tests, and to adapt a source by the same tokens",
            _identity,
            transfer=None,
            adapt=Adapt(("q", "k", "v", "o"), rank=8, alpha=16, learning_rate=1e-3),
        ),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        ValueError: an unknown name; the message lists the nearest.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]
