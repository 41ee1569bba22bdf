"""
When Anderson acceleration pays: work with and without.

For denoising at several noise levels and for the operators of ``operators.py``, prints
outer iterations and conjugate gradient steps, the mean over all images, and the work in
applications of W^T M^2 W if a mask takes as long as 1.2 of them (each outer iteration
has one mask and one application for the residual).

    python benchmarks/acceleration.py --data IMAGES [--images 6] [--size 96]
        [--rtol 1e-3] [--only denoising] [--threads 1]
"""

from __future__ import annotations

import argparse

import torch
from operators import noisy, problems

from deepinv_deal import DEAL, SolverOptions
from deepinv_deal._batch import central
from deepinv_deal.files import load_images

#: Accuracy of the inner solves, depth.
STRATEGIES = ((0.5, 0), (0.3, 5), (0.5, 5), (0.7, 5))
LEVELS = (5, 15, 25, 50)
MASK = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rtol", type=float, default=2e-2)
    parser.add_argument("--max-iter", type=int, default=100)
    parser.add_argument("--only", default="", help="part of the problems' names")
    parser.add_argument("--pretrained", default="deal_gray")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    images = load_images(args.data, 1)[: args.images]
    x = torch.cat([central(image[None], args.size) for image in images]).float() / 255
    print(f"{'forcing, depth':26s}" + "".join(f"{s!s:>19s}" for s in STRATEGIES))
    cases = [(f"denoising {s}", None, s, None) for s in LEVELS]
    cases += [case for case in problems(args.size) if case[0] != "denoising"]
    for name, physics, level, weight in cases:
        if args.only not in name:
            continue
        truth = x
        if "MRI" in name:
            truth = torch.cat([x, 0.3 * x.flip(-1)], 1)
        y = noisy(truth if physics is None else physics.A(truth), level)
        settings = {"sigma": level / 255} if physics is None else {"lambda_reg": weight}
        row = ""
        for forcing, anderson in STRATEGIES:
            model = DEAL(
                pretrained=args.pretrained,
                solver=SolverOptions(forcing=forcing, anderson=anderson),
                rtol=args.rtol,
                max_iter=args.max_iter,
                warn=False,
            )
            with torch.no_grad():
                _, info = model(y, physics, **settings, return_info=True)
            counts = (info.n_iter, info.inner_iter)
            n, cg = (float(count.double().mean()) for count in counts)
            work = (n + 1) * (1 + MASK) + cg
            mark = "" if info.converged.all() else "*"
            row += f"{f'{n:.0f}/{cg:.0f} {work:.0f}{mark}':>19s}"
        print(f"{name:26s}{row}", flush=True)
    print("* not converged")


if __name__ == "__main__":
    main()
