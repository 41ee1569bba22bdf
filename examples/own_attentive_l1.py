r"""
An attentive l1 prior of one's own, in one file
===============================================

The regularizer is :math:`\|m(x) \odot W x\|_1` with the learned filters :math:`W` of
SAFI and a mask that needs no network: with the mean :math:`g` of the absolute responses
around a pixel and one learned contrast :math:`c` for every filter,

.. math::
    m(x) = \frac{1}{1 + (g / c)^2}, \qquad g = \mathrm{mean}_{5 \times 5}\, |W x|.

So it smooths where responses are small, and keeps edges and texture.

The command line trains it, and takes its weights afterwards:

.. code-block:: bash

    deepinv-deal train safi --prior own_attentive_l1.py:EdgeStoppingL1 \
        --data PHOTOGRAPHS --out run --sigma 25 --time-budget 1h
    deepinv-deal evaluate --prior own_attentive_l1.py:EdgeStoppingL1 \
        --pretrained run/best.safetensors --data BSD68 --sigma 25
"""

import torch
from torch.nn import functional as F

from deepinv_deal import SAFI
from deepinv_deal.priors import AttentiveL1Prior
from deepinv_deal.training import AttentiveL1Trainer
from deepinv_deal.training.attentive_l1 import start_from_cosines

# %%
# The prior
# ---------
# The base class has the filters, the weight, the solver's equation, the proximal map
# and the storage. Two methods are left.


class EdgeStoppingL1(AttentiveL1Prior):
    """An l1 prior whose mask falls where filters respond strongly around a pixel."""

    def __init__(self, num_filters: int = 48, sigma: float = 25 / 255):
        super().__init__(num_filters, sigma)
        self.contrast = torch.nn.Parameter(torch.full((num_filters,), 2 * sigma))

    def bind_mask(self, nu):
        """The mask, as a function of an image and its responses over ``nu``."""
        contrast = self.contrast.abs().clamp_min(1e-6).view(1, -1, 1, 1) / nu

        def mask(_, Wx):
            around = F.avg_pool2d(Wx.abs(), 5, stride=1, padding=2)
            return 1 / (1 + (around / contrast).square())

        return mask

    def stretch_mask(self, factor):
        """Contrasts have the unit of the image: this serves other noise levels."""
        self.contrast.mul_(factor)


# %%
# The training
# ------------
# In Python, a trainer is one line; its settings are those of SAFI.


class EdgeStoppingL1Trainer(AttentiveL1Trainer):
    """Trains the prior; ``EdgeStoppingL1Trainer(AttentiveL1Recipe(...)).train()``."""

    prior_type = EdgeStoppingL1


# %%
# A first look
# ------------
# With the filters of the discrete cosine transform, from which training starts, it
# denoises at once.

if __name__ == "__main__":
    from skimage.data import camera

    x = torch.from_numpy(camera()[::4, ::4] / 255.0).float()[None, None]
    prior = EdgeStoppingL1()
    start_from_cosines(prior, float(prior.sigma))
    y = x + float(prior.sigma) * torch.randn_like(x)
    with torch.no_grad():
        x_hat = SAFI(prior=prior)(y)
    for name, image in (("noisy", y), ("denoised", x_hat)):
        print(f"{name}: {-10 * (image - x).square().mean().log10():.2f} dB")
