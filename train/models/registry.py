"""Networks by name. This module imports a config class when its network is chosen, and Flax when a network is made.

To add a network, write one module in this package and one line in `NETWORKS`. The module holds a subclass of
`NetworkConfig`, whose fields become options of the command line, and the network that it makes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from train.errors import InputError, describe
from train.plugins import check_arguments, import_object, is_external, keyword_parameters, parse_call

if TYPE_CHECKING:
    from flax import nnx

    from train.config import ModelConfig

NETWORKS = {
    "unet": "train.models.configs:UNetConfig",
    "segresnet": "train.models.configs:SegResNetConfig",
    "unetr": "train.models.configs:UNETRConfig",
}
"""Architecture -> where its config class is."""


@dataclass(frozen=True)
class NetworkConfig:
    """Options of one architecture. Each field is an option of the command line, its docstring the help text.

    A network from outside the project has this class itself: its options are the arguments of its factory.

    Attributes:
        default_norm: value of `--norm` that equals leaving it out.
        fixed_patch: whether the network sees patches of one size only, that of training.
    """

    default_norm: ClassVar[str] = "instance"
    fixed_patch: ClassVar[bool] = False

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        """What each side of a patch must be a multiple of."""
        return (1,) * spatial_dims

    def make(
        self,
        *,
        in_channels: int,
        out_channels: int,
        spatial_dims: int,
        patch: tuple[int, ...],
        dropout: float,
        rngs: "nnx.Rngs",
        **norm: Any,
    ) -> "nnx.Module":
        """The network, freshly initialised. `norm` has the one key "norm", or none for the default.

        Raises:
            ValueError: if the options contradict one another.
        """
        raise NotImplementedError


def config_class(architecture: str) -> type[NetworkConfig]:
    """The class of the options of an architecture.

    Raises:
        InputError: if no network has this name.
    """
    if is_external(architecture):
        return NetworkConfig
    if architecture not in NETWORKS:
        raise InputError(
            f"architecture is {architecture!r}: give {', '.join(NETWORKS)}, or package.module:factory(KEY=VALUE)."
        )
    return import_object(NETWORKS[architecture])


def make_network(model: "ModelConfig", **sizes: Any) -> "nnx.Module":
    """The network of `model`, freshly initialised.

    An architecture from outside, such as `my_networks:make(width=16)`, names a factory of a `flax.nnx.Module` that
    maps images `[batch, *patch, in_channels]` to logits `[batch, *patch, out_channels]`. The factory takes
    in_channels, out_channels, spatial_dims, patch and rngs by keyword, and the arguments in the name. If the module
    has an attribute `divisor`, sides of a patch must be multiples of it.

    Args:
        model: architecture and options.
        sizes: `in_channels`, `out_channels`, `spatial_dims`, `patch` and `rngs`.

    Raises:
        InputError: if the options contradict one another, or a factory from outside does not make a network.
    """
    if model.slices:
        from train.models.slicewise import Slicewise

        planar = {**sizes, "spatial_dims": 2, "patch": sizes["patch"][:2]}
        return Slicewise(make_network(dataclasses.replace(model, slices=False), **planar))
    if is_external(model.architecture):
        return _call_factory(model.architecture, sizes)
    norm = {"norm": model.norm} if model.norm else {}
    try:
        return model.network.make(dropout=model.dropout, **norm, **sizes)
    except ValueError as error:
        raise InputError(f"These options make no {model.architecture}: {error}") from error


def _call_factory(architecture: str, sizes: Mapping[str, Any]) -> "nnx.Module":
    from flax import nnx

    call = parse_call(architecture)
    factory = import_object(call.name)
    own = {name: value for name, value in keyword_parameters(factory).items() if name not in sizes}
    check_arguments(call, own)
    try:
        network = factory(**sizes, **call.arguments)
    except Exception as error:
        raise InputError(f"{architecture} could not make a network ({describe(error)}).") from error
    if not isinstance(network, nnx.Module):
        raise InputError(f"{architecture} returns a {type(network).__name__}: return a flax.nnx.Module.")
    return network


def check_logits(
    architecture: str, network: "nnx.Module", patches: Sequence[tuple[int, ...]], channels: int, classes: int
) -> None:
    """Checks the shape of the logits that a network from outside gives, without computing them.

    Args:
        architecture: its name.
        network: its module, with shapes in place of arrays (`nnx.eval_shape`).
        patches: sizes of the patches that it must take.
        channels: of the image.
        classes: of the logits.

    Raises:
        InputError: if the module fails, or its logits have another shape.
    """
    import jax
    from flax import nnx

    for training in (True, False):
        network.train() if training else network.eval()
        for patch in patches:
            image = jax.ShapeDtypeStruct((1, *patch, channels), "float32")
            try:
                logits = nnx.eval_shape(lambda network, image: network(image), network, image)
            except Exception as error:
                raise InputError(
                    f"{architecture} fails on images of shape {image.shape} ({describe(error)})."
                ) from error
            if training and isinstance(logits, tuple):  # deep supervision, the finest level first
                logits = logits[0]
            found, expected = getattr(logits, "shape", type(logits).__name__), (1, *patch, classes)
            if found != expected:
                raise InputError(
                    f"{architecture} gives logits of shape {found} for images of shape {image.shape}: it must give "
                    f"{expected}, [batch, *patch, out_channels]."
                )
