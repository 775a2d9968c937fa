"""What activations are counted from, and what a product keeps of its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mbx.train.budget.adapters import pairs_of
from mbx.train.budget.layers import Layer
from mbx.train.budget.shape import Shape
from mbx.train.model.adapted import Linear
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.kernels import fuses_convolution
from mbx.train.recipe.sections import Recipe

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: Bytes of an element cast to FP8, with its scales: one a 128 elements (fp32) in blocks, one a 32 (one byte) in MXFP8,
#: and of one cast to FP4, one a 16 (one byte) in NVFP4.
_CAST = {"delayed": 1.0, "tensorwise": 1.0, "blockwise": 1 + 4 / 128, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
#: The same of a weight, whose blocks are 128 x 128 where inputs' are 1 x 128.
WEIGHT_CAST = {**_CAST, "blockwise": 1.0}


@dataclass(frozen=True, slots=True)
class Load:
    """What activations are counted from: the recipe, the sizes, the tokens of a micro-batch on this rank.

    `known`: the model's adapted linears. `targets`: names of those of the layer that is counted. `fuses_convolution`:
    as it is installed here.
    """

    recipe: Recipe
    plan: Blueprint
    shape: Shape
    tokens: int
    known: Mapping[str, Linear] = field(default_factory=dict)
    targets: frozenset[str] = frozenset()
    fuses_convolution: bool = field(default_factory=fuses_convolution)

    def at(self, layer: Layer) -> Load:
        """The same at one layer, whose adapted linears are `targets`."""
        if not self.frozen:
            return self
        pairs = pairs_of(self.recipe, self.plan, self.shape, layer, self.known)
        return replace(self, targets=frozenset(one.leaf for one in pairs))

    @property
    def b(self) -> int:
        """Bytes of an element of activations."""
        return BYTES[self.recipe.train.precision]

    @property
    def cast(self) -> float:
        """Bytes of an element of a product's input as it is kept for the weight's gradient."""
        return _CAST.get(self.recipe.fp8.recipe, float(self.b))

    @property
    def fp8(self) -> bool:
        """Whether the decoder's products run in FP8."""
        return self.recipe.fp8.recipe != "none"

    @property
    def frozen(self) -> bool:
        """Whether the base's weights take no gradients."""
        return self.recipe.lora.rank > 0

    @property
    def tp(self) -> int:
        """Ranks that share heads and widths."""
        return self.recipe.parallel.tp

    @property
    def cut(self) -> int:
        """Ranks that share the tokens outside of the products: tp under sequence parallelism."""
        p = self.recipe.parallel
        return p.tp if p.sequence_parallel else 1

    def adapted(self, *names: str) -> bool:
        """Whether one of the products `names` has an adapter."""
        return self.frozen and any(name in self.targets for name in names)

    def seen(self, *names: str, normed: bool = False, held: bool = False) -> float:
        """Bytes an element that the products `names` keep of an input they share.

        A trained product keeps it for its weight's gradient; in FP8 each product its own cast of it. A frozen one
        keeps nothing, its adapter the input as it is; where the norm is part of the product (`normed`), Transformer
        Engine then keeps the cast output as well. `held`: something else keeps the input as it is anyway.
        """
        own = 0.0 if held else float(self.b)
        if not self.frozen:
            return len(names) * self.cast if self.fp8 else own
        if not self.adapted(*names):
            return 0.0
        return own + (self.cast if self.fp8 and normed else 0.0)
