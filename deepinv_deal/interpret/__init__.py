r"""
Looking inside a model and a reconstruction.

Every function returns tensors, and most have a companion that draws them on a
matplotlib figure of its own: ``plot_...(...).savefig(path)``.

* the weights: filters, the spectrum of :math:`W^{\top} W`, splines, atoms
* one image: masked filter responses, the path of the iteration, averaging kernels,
  smooth and sparse part
* the map :math:`T` near its solution, from :func:`linearize`: convergence rate,
  contraction factor, stability, divergence, uncertainty of every pixel
* ablations: the same model without its mask, or with few filters
"""

from deepinv_deal.interpret.ablation import with_filters, without_mask
from deepinv_deal.interpret.averaging import (
    averaging_kernels,
    plot_averaging_kernels,
)
from deepinv_deal.interpret.curves import (
    Curve,
    learned_splines,
    mask_curves,
)
from deepinv_deal.interpret.dictionaries import (
    AtomUsage,
    Decomposition,
    atom_usage,
    decompose,
    plot_atoms,
    plot_decomposition,
)
from deepinv_deal.interpret.filters import (
    effective_filters,
    normal_response,
    plot_filters,
    plot_normal_response,
)
from deepinv_deal.interpret.linearization import Linearization, linearize
from deepinv_deal.interpret.local import (
    asymptotic_rate,
    divergence,
    jacobian_norm,
    plot_convergence,
    spectral_radius,
    stability_constant,
)
from deepinv_deal.interpret.masks import (
    MaskedResponses,
    masked_responses,
    plot_masked_responses,
)
from deepinv_deal.interpret.paths import (
    SolutionPath,
    plot_path,
    solution_path,
)
from deepinv_deal.interpret.uncertainty import (
    Calibration,
    calibrate,
    plot_uncertainty,
    posterior_samples,
    posterior_variance,
)

__all__ = [
    "AtomUsage",
    "Calibration",
    "Curve",
    "Decomposition",
    "Linearization",
    "MaskedResponses",
    "SolutionPath",
    "asymptotic_rate",
    "atom_usage",
    "averaging_kernels",
    "calibrate",
    "decompose",
    "divergence",
    "effective_filters",
    "jacobian_norm",
    "learned_splines",
    "linearize",
    "mask_curves",
    "masked_responses",
    "normal_response",
    "plot_atoms",
    "plot_averaging_kernels",
    "plot_convergence",
    "plot_decomposition",
    "plot_filters",
    "plot_masked_responses",
    "plot_normal_response",
    "plot_path",
    "plot_uncertainty",
    "posterior_samples",
    "posterior_variance",
    "solution_path",
    "spectral_radius",
    "stability_constant",
    "with_filters",
    "without_mask",
]
