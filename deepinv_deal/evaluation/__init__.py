"""The published protocols as code: images in, PSNR and SSIM out."""

from deepinv_deal.evaluation.baselines import Adjoint, TotalVariation
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
from deepinv_deal.evaluation.speed import (
    SPEED_TASKS,
    SpeedRun,
    compare_speed,
    deepinv_model,
    plot_speed,
    speed_table,
)
from deepinv_deal.evaluation.tasks import TASKS, Condition, Task, make_kernel
from deepinv_deal.evaluation.timing import ApplicationTimes, application_times

__all__ = [
    "speed_table",
    "plot_speed",
    "deepinv_model",
    "compare_speed",
    "application_times",
    "SpeedRun",
    "ApplicationTimes",
    "SPEED_TASKS",
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
    "summarise",
    "tune_task",
    "write_csv",
]
