"""The published protocols as code: images in, PSNR and SSIM out."""

from deepinv_deal.evaluation.baselines import Adjoint, TotalVariation
from deepinv_deal.evaluation.phantoms import shepp_logan_volume
from deepinv_deal.evaluation.published import PUBLISHED, Published
from deepinv_deal.evaluation.run import (
    Score,
    add_noise,
    evaluate,
    quality,
    summarise,
    tune_task,
    write_csv,
)
from deepinv_deal.evaluation.tasks import TASKS, Condition, Task, make_kernel

__all__ = [
    "PUBLISHED",
    "TASKS",
    "Adjoint",
    "Condition",
    "Published",
    "Score",
    "Task",
    "TotalVariation",
    "add_noise",
    "evaluate",
    "make_kernel",
    "quality",
    "shepp_logan_volume",
    "summarise",
    "tune_task",
    "write_csv",
]
