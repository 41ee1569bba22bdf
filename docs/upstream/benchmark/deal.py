import deepinv as dinv
import torch
from benchopt import BaseSolver


class Solver(BaseSolver):
    """
    DEAL, deep attentive least squares, by the package ``deepinv-deal``.

    Denoising takes the noise level from the physics and the learned weight.
    """

    name = "DEAL"

    requirements = ["pip::deepinv-deal"]

    parameters = {}

    #: Arguments of the model by the class of the physics. Those of deblurring were
    #: chosen on two photographs that are not of the benchmark.
    SETTINGS = {
        "Denoising": {},
        "Blur": {"lambda_reg": 5.0, "sigma": 15 / 255},
    }

    def skip(self, train_dataset=None, physics=None):
        kind = type(physics).__name__
        if kind not in self.SETTINGS:
            return True, f"no weight was chosen for {kind}"
        return False, None

    def set_objective(self, train_dataset=None, physics=None):
        from deepinv_deal import DEAL

        device = dinv.utils.get_freer_gpu() if torch.cuda.is_available() else "cpu"
        settings = self.SETTINGS[type(physics).__name__]
        self.model = DEAL(in_channels=3, device=device, **settings)
        self.model.device = device

    def run(self, _):
        pass

    def get_result(self):
        return dict(model=self.model)
