"""The published protocols as code: images in, PSNR and SSIM out."""

from deepinv_deal.evaluation.published import PUBLISHED, Published
from deepinv_deal.evaluation.run import (
    Score,
    add_noise,
    evaluate,
    evaluate_denoising,
    quality,
    summarise,
    tuned_tv,
    write_csv,
)
from deepinv_deal.evaluation.tasks import TASKS, Condition, Task, make_kernel

__all__ = [
    "PUBLISHED",
    "TASKS",
    "Condition",
    "Published",
    "Score",
    "Task",
    "add_noise",
    "evaluate",
    "evaluate_denoising",
    "make_kernel",
    "quality",
    "summarise",
    "tuned_tv",
    "write_csv",
]
