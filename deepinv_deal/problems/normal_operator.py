r"""The normal operator :math:`A^{\top} A` of a physics, and what trials tell of it."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from deepinv.physics import Denoising, LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deal._batch import expand, inner, norm, select
from deepinv_deal.problems.checks import describe, is_out_of_memory
from deepinv_deal.problems.layout import ImageLayout
from deepinv_deal.problems.sampled_convolution import SampledConvolution
from deepinv_deal.solvers.conjugate_gradient import LinearMap
from deepinv_deal.solvers.preconditioner import (
    PLANE,
    Fourier,
    convolve,
    diagonal,
    faithful,
    transfer_function,
)

#: An adjoint that is wrong by more than this, relative, is refused.
LARGEST_ADJOINT_ERROR = 1e-2

#: Accuracy and limit of the power iteration for the norm of a physics, and the factor
#: by which its estimate, which is from below, is enlarged to a bound.
NORM_RTOL, NORM_MAX_ITER, NORM_MARGIN = 1e-4, 200, 1.05


class NormalOperator:
    """
    A symmetric map on unknowns ``(B, C, H, W)``, with what a few trials tell of it.

    Nothing is tried before it is asked for, and everything once. Trials see the
    operator as it is then: where a physics changes its parameters, make a new one.

    :param Callable apply: the map; linear, symmetric, positive semi-definite.
    :param torch.Tensor like: images that it takes; their values do not matter.
    :param tuple transforms: Fourier transforms in which it may be a product.
    """

    def __init__(
        self,
        apply: LinearMap,
        like: Tensor,
        transforms: tuple[Fourier, ...] = (PLANE,),
    ):
        self._apply = apply
        # Only shape, dtype and device are kept.
        self.like = like.detach().new_zeros(()).expand(like.shape)
        self.transforms = transforms

    def __call__(self, x: Tensor) -> Tensor:
        """Applies the map, as exactly as it is given."""
        return self._apply(x)

    @cached_property
    @torch.no_grad()
    def _best_transform(self) -> tuple[Fourier, tuple[Tensor, Tensor]]:
        first, *others = self.transforms
        best = first, transfer_function(self, self.like, first)
        for fourier in others:
            if faithful(best[1][1]).all():
                break
            found = transfer_function(self, self.like, fourier)
            if found[1].max() < best[1][1].max():
                best = fourier, found
        return best

    @property
    def fourier(self) -> Fourier:
        """The Fourier transform in which it is closest to a product."""
        few = len(self.transforms) == 1
        return self.transforms[0] if few else self._best_transform[0]

    @property
    def transfer(self) -> tuple[Tensor, Tensor]:
        """
        Eigenvalues of the closest circular convolution, the shape of a spectrum, and
        their relative error, ``(B,)``.
        """
        return self._best_transform[1]

    @cached_property
    def circulant(self) -> Tensor:
        """Samples for which it is a circular convolution up to rounding, ``(B,)``."""
        return faithful(self.transfer[1])

    @cached_property
    def is_circulant(self) -> bool:
        """Whether it is one for all samples."""
        return bool(self.circulant.all())

    @property
    def similar(self) -> Tensor | None:
        """
        Eigenvalues of a convolution alike, ``(B, C or 1, H or 1, W or 1)``, if one is
        known: for preconditioners of what is no convolution.
        """
        return None

    @cached_property
    @torch.no_grad()
    def diagonal(self) -> tuple[Tensor, Tensor]:
        """Its diagonal, ``(B, C, H, W)``, and the relative error of it, ``(B,)``."""
        if not self.is_circulant:
            return diagonal(self, self.like)
        # The diagonal of a convolution is the mean of its eigenvalues.
        values, _ = self.transfer
        mean = values.mean((2, 3), keepdim=True)
        if self.fourier.depth:
            mean = mean.unflatten(1, (self.fourier.depth, -1))
            mean = mean.mean(1, keepdim=True).expand_as(mean).flatten(1, 2)
        misfit = norm(values - mean) / norm(values)
        if self.fourier.complex_pair:
            mean = torch.cat([mean, mean], 1)
        return mean.expand_as(self.like), misfit.nan_to_num(0)

    @cached_property
    def fast(self) -> LinearMap:
        """
        The map in its fastest form: a Fourier transform where it is a convolution but
        no multiple of the identity. Equal up to rounding.
        """
        if not self.is_circulant or not bool((~faithful(self.diagonal[1])).all()):
            return self
        return partial(convolve, self.transfer[0], fourier=self.fourier)

    @cached_property
    def is_formula(self) -> Tensor:
        """Samples for which the fastest form is a formula, no physics, ``(B,)``."""
        return faithful(torch.minimum(self.transfer[1], self.diagonal[1]))

    @cached_property
    @torch.no_grad()
    def principal(self) -> Tensor:
        """
        The image of norm 1 that it stretches most, for every sample, by power
        iteration.
        """
        v = random_images(self.like, 1)[0]
        value = self.like.new_zeros(len(v))
        settled = torch.zeros_like(value, dtype=torch.bool)
        for _ in range(NORM_MAX_ITER):
            # A sample that has settled stays, so that it does not depend on others.
            v = select(settled, v, v / expand(norm(v), v))
            stretched = self(v)
            size = norm(stretched)
            settled = settled | ~((size - value).abs() > NORM_RTOL * size)
            value = size
            if settled.all():
                break
            v = select(settled, v, stretched)
        return v / expand(norm(v), v)

    @property
    def mean_eigenvalue(self) -> Tensor:
        """
        About the mean of its eigenvalues, ``(B,)``, from one random image;
        differentiable.
        """
        return self._mean() if torch.is_grad_enabled() else self._known_mean

    @cached_property
    def _known_mean(self) -> Tensor:
        return self._mean()

    def _mean(self) -> Tensor:
        v = random_images(self.like, 1)[0]
        return inner(v, self(v)) / inner(v, v)

    @property
    def sqnorm(self) -> Tensor:
        """
        Its norm for every sample, ``(B,)``: the largest eigenvalue, differentiable.

        :meth:`deepinv.physics.LinearPhysics.compute_sqnorm` would give one number for
        the whole batch.
        """
        return norm(self(self.principal))

    @cached_property
    @torch.no_grad()
    def norm_bound(self) -> Tensor:
        """An upper bound of its norm, ``(B,)``, sharp for convolutions."""
        if self.is_circulant:
            return self.transfer[0].amax((1, 2, 3))
        return NORM_MARGIN * self.sqnorm


class KnownPhysics(NormalOperator):
    r"""
    :math:`A^{\top} A` of a physics on what is solved for, tried out.

    The physics is tried on random images: an ``A_adjoint`` that is not the adjoint of
    ``A`` raises, and an ``A_adjoint_A`` that is not their product is not used. Models
    make one in every call, and take one in place of the physics: what was learnt is
    then used again for other measurements of images of the same shape, as in
    ``known = model.examine(y, physics)`` and ``model(another_y, known)``.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Inpainting
    >>> from deepinv_deal import DEAL
    >>> model = DEAL(pretrained=None, num_filters=4)
    >>> physics = Inpainting((1, 16, 17), mask=0.5)
    >>> y = physics(torch.rand(3, 1, 16, 17))
    >>> known = model.examine(y, physics)
    >>> torch.equal(model(y, known), model(y, physics))
    True

    :param deepinv.physics.LinearPhysics physics: forward operator.
    :param ImageLayout layout: how its images become what is solved for.
    :param torch.Tensor like: what is solved for; the values do not matter.
    :param bool trial: whether to try the physics out; otherwise it is trusted.
    :raises ValueError: if the physics is not linear or its adjoint is wrong.
    """

    def __init__(
        self, physics: Any, layout: ImageLayout, like: Tensor, *, trial: bool = True
    ):
        self.physics, self.layout = physics, layout
        #: Whether it is used again for other measurements.
        self.kept = False
        #: Remarks on what the trials told.
        self.notes: list[str] = []
        super().__init__(self._product, like, layout.transforms)
        #: What replaces it if it is a convolution of which some pixels are measured.
        self.sampled: SampledConvolution | None = None
        self.composed = not hasattr(physics, "A_adjoint_A")
        if trial:
            self._try_out()

    def _product(self, x: Tensor) -> Tensor:
        image, physics = self.layout.embed(x), self.physics
        if self.composed:
            return self.layout.extract(physics.A_adjoint(physics.A(image)))
        return self.layout.extract(physics.A_adjoint_A(image))

    @cached_property
    def fast(self) -> LinearMap:
        """That of any operator, or of a convolution that is sampled."""
        return super().fast if self.sampled is None else self.sampled

    @cached_property
    def is_formula(self) -> Tensor:
        """Samples for which this is a formula, no physics, ``(B,)``."""
        return super().is_formula | (self.sampled is not None)

    @torch.no_grad()
    def _try_out(self) -> None:
        u, v = (self.layout.embed(x) for x in random_images(self.like, 2))
        v = u + v
        name = type(self.physics).__name__
        Au, Av = self.physics.A(u), self.physics.A(v)
        product = self.physics.A_adjoint(Au)
        error = (measured_inner(Au, Av) - inner(product, v)).abs()
        size = (measured_inner(Au, Au) * measured_inner(Av, Av)).sqrt()
        worst = float((error / size.where(size > 0, 1)).max())
        if not worst <= LARGEST_ADJOINT_ERROR:
            raise ValueError(
                f"physics {name} is not linear, or its A_adjoint is not the adjoint of "
                f"its A: <A u, A v> and <A_adjoint A u, v> differ by {worst:.1e} "
                "(relative) on random images. Try physics.adjointness_test(u). If A is "
                "linear, LinearPhysics(A=physics.A, A_adjoint=adjoint_function("
                "physics.A, x.shape, dtype=x.dtype)) is right, with adjoint_function "
                "of deepinv.physics.forward."
            )
        tolerance = 1e3 * torch.finfo(self.like.dtype).eps
        if worst > tolerance:
            self.notes.append(
                f"A_adjoint is only approximately the adjoint of A (relative error "
                f"{worst:.1e}), so the solution is approximate too."
            )
        if self.layout.is_image:
            self.sampled = SampledConvolution.of(self.physics, u, Au)
        if self.composed:
            return
        try:
            difference = norm(self.physics.A_adjoint_A(u) - product)
            equal = not bool((difference > tolerance * norm(product)).any())
        except (RuntimeError, IndexError) as error:  # one of another shape, too
            if is_out_of_memory(error):
                raise
            equal = False
        if not equal:
            self.composed = True
            self.notes.append(
                f"A_adjoint_A of {name} is not A_adjoint times A, the product is used."
            )


def is_identity(physics: Any) -> bool:
    """Whether a physics only adds noise."""
    return physics is None or isinstance(physics, Denoising)


def check_linear(physics: Any) -> None:
    """
    Checks that a physics can be a least-squares data term.

    :param object physics: the argument.
    :raises TypeError: if it is not linear or has no adjoint.
    """
    if isinstance(physics, Physics) and not isinstance(physics, LinearPhysics):
        raise TypeError(
            f"physics must be linear, got {type(physics).__name__}, which is not a "
            "deepinv.physics.LinearPhysics: the data term is least squares."
        )
    if physics is not None and not hasattr(physics, "A_adjoint"):
        raise TypeError(
            "physics must be a deepinv.physics.LinearPhysics, got "
            f"{type(physics).__name__} without A_adjoint."
        )


def back_projection(physics: Any, y: Any) -> Any:
    r"""
    Returns :math:`A^{\top} y`, an image of the physics.

    :param deepinv.physics.LinearPhysics physics: forward operator.
    :param torch.Tensor y: measurements.
    :raises ValueError: if they do not fit together.
    """
    shape = (
        [tuple(part.shape) for part in y] if isinstance(y, TensorList) else describe(y)
    )
    try:
        image = physics.A_adjoint(y)
    except (RuntimeError, IndexError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"y of {shape} does not fit the physics {type(physics).__name__}: {error}"
        ) from error
    first = y[0] if isinstance(y, TensorList) else y
    if isinstance(image, Tensor) and image.ndim > 3 and len(image) != len(first):
        raise ValueError(
            f"y of {shape} holds {len(first)} samples, but the physics makes "
            f"{len(image)} images of it (shape {tuple(image.shape)}). Add the batch or "
            "channel dimension that y lacks."
        )
    return image


def random_images(like: Tensor, number: int) -> Tensor:
    """Images ``(number, B, C, H, W)``, the same for every sample and call."""
    rng = torch.Generator("cpu").manual_seed(0)
    shape = (number, 1, *like.shape[1:])
    v = torch.randn(shape, generator=rng, dtype=like.dtype, device="cpu")
    return v.to(like.device).expand(-1, len(like), *like.shape[1:]).contiguous()


def measured_inner(a: Any, b: Any) -> Tensor:
    """Inner product of measurements per sample, ``(B,)``."""
    if isinstance(a, TensorList):
        return torch.stack([inner(u, v) for u, v in zip(a, b, strict=True)]).sum(0)
    return inner(a, b)
