r"""
Training DEAL with deepinv's Trainer
====================================

The output of DEAL is differentiable in its weights: at the fixed point
:math:`\hat x = T_\theta(\hat x)`,

.. math::
    \frac{\partial \hat x}{\partial \theta}
    = \Big( I - \frac{\partial T_\theta}{\partial x} \Big)^{-1}
    \frac{\partial T_\theta}{\partial \theta},

which takes one more linear solve and no memory of the iterations. So the model trains
like any other network. Here a small one learns to denoise from a few photographs.
"""

# %%
# Data
# ----
#
# Patches of scikit-image's photographs, and noise of level 25/255.

import deepinv as dinv
import torch
from skimage import data
from torch.utils.data import DataLoader, Dataset

from deepinv_deal import DEAL, AdjointOptions

rng = torch.Generator().manual_seed(0)
torch.manual_seed(0)
SIZE = 32


class Patches(Dataset):
    """Random crops of photographs, the same in every epoch."""

    def __init__(self, names, number):
        photos = [getattr(data, name)() for name in names]
        gray = [p.mean(2) if p.ndim == 3 else p for p in photos]
        self.patches = []
        for i in range(number):
            photo = torch.from_numpy(gray[i % len(gray)] / 255).float()
            top, left = (
                int(torch.randint(n - SIZE, (), generator=rng)) for n in photo.shape
            )
            self.patches.append(photo[None, top : top + SIZE, left : left + SIZE])

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, i):
        return self.patches[i]


train = DataLoader(Patches(["astronaut", "coffee", "chelsea"], 160), batch_size=4)
test = DataLoader(Patches(["camera"], 8), batch_size=8)
physics = dinv.physics.Denoising(dinv.physics.GaussianNoise(25 / 255))

# %%
# A small model
# -------------
#
# ``AdjointOptions(jacobian_free=True)`` replaces the inverse by the identity: a little
# less exact, a good deal faster, as in the paper. The trainer is deepinv's.

model = DEAL(
    pretrained=None,
    num_filters=8,
    rtol=0.05,
    adjoint=AdjointOptions(jacobian_free=True),
)
trainer = dinv.Trainer(
    model,
    physics,
    optimizer=torch.optim.Adam(model.parameters(), lr=5e-3),
    train_dataloader=train,
    epochs=3,
    losses=dinv.loss.SupLoss(),
    metrics=dinv.metric.PSNR(),
    online_measurements=True,
    non_blocking_transfers=False,
    save_path=None,
    verbose=False,
    show_progress_bar=False,
)
before = trainer.test(test)["PSNR"]
model = trainer.train()
after = trainer.test(test)["PSNR"]
print(f"test PSNR {before:.2f} dB with random weights, {after:.2f} dB after training")

# %%
# What it learned
# ---------------
#
# A part of the test image, larger than the patches, and what the trained model makes of
# it.

x = torch.from_numpy(data.camera()[100:196, 200:296] / 255).float()[None, None]
y = physics(x)
psnr = dinv.metric.PSNR()
with torch.no_grad():
    x_hat = model(y, physics)
dinv.utils.plot(
    {"image": x, "noisy": y, "denoised": x_hat},
    subtitles=["", f"{psnr(y, x).item():.2f} dB", f"{psnr(x_hat, x).item():.2f} dB"],
    rescale_mode="clip",
    figsize=(7, 3),
)

# %%
# For real
# --------
#
# ``deepinv-deal train deal --data IMAGES --out RUN --time-budget 2h`` does the same in
# earnest: noise levels from 0 to 50/255, warm starts from earlier solutions of the same
# patch, validation, checkpoints, exact resume after an interruption.
