"""``deepinv-deal reconstruct``: measurements and operator from files."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from deepinv_deal.cli._likelihood import add_likelihood_option
from deepinv_deal.cli._options import (
    Commands,
    add_model_options,
    add_outcome_options,
    channels_of,
    make_model,
    report,
)

if TYPE_CHECKING:
    from torch import Tensor

    from deepinv_deal.files import Picture

KERNEL_HELP = (
    "FILE (.npy, .npz:NAME, .mat:NAME/INDEX, image), gaussian:STD, motion:SIZE or "
    "square:SIZE"
)


def add_reconstruct(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    reconstruct = commands.add_parser(
        "reconstruct", help="reconstruct an image from measurements in a file"
    )
    operators = reconstruct.add_subparsers(required=True, metavar="OPERATOR")

    blur = _operator(operators, "blur", "convolution with a kernel", _blur)
    blur.add_argument("--kernel", required=True, help=KERNEL_HELP)
    blur.add_argument(
        "--padding",
        choices=("circular", "valid", "reflect", "replicate", "constant"),
        default="circular",
        help="what the image is outside; 'valid': y is smaller than the image",
    )

    inpainting = _operator(
        operators, "inpainting", "some pixels are missing", _inpainting
    )
    inpainting.add_argument(
        "--mask", required=True, help="file: nonzero where the pixel was measured"
    )

    downsampling = _operator(
        operators, "downsampling", "blur, then every n-th pixel", _downsampling
    )
    downsampling.add_argument("--factor", type=int, required=True, help="n")
    downsampling.add_argument(
        "--kernel", help=f"{KERNEL_HELP}; if unset, no blur", metavar="KERNEL"
    )

    mri = _operator(
        operators,
        "mri",
        "Cartesian MRI: complex k-space (H, W), or (N, H, W) with coil maps",
        _mri,
    )
    mri.add_argument(
        "--mask",
        help="file: nonzero where k-space was measured; if unset, where y is not zero",
    )
    mri.add_argument("--coil-maps", help="file with complex maps (N, H, W)")
    mri.add_argument(
        "--zero-frequency",
        choices=("centre", "corner"),
        default="centre",
        help="where k-space and mask have it; 'corner' is the order of numpy.fft.fft2",
    )
    mri.add_argument(
        "--complex-mode",
        choices=("real_imag", "real"),
        default="real_imag",
        help="whether the image has an imaginary part",
    )


def _operator(
    operators: Commands[argparse.ArgumentParser], name: str, text: str, load: Any
) -> argparse.ArgumentParser:
    parser = operators.add_parser(
        name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("input", help="measurements: image, .npy, .npz:NAME, ...")
    parser.add_argument("output", help="image, .npy or .pt")
    parser.add_argument(
        "--lambda-reg",
        type=float,
        help="weight; if unset, 1 for DEAL and the learned one for dictionaries; SAFI "
        "and MMR need it",
    )
    parser.add_argument(
        "--sigma-model",
        type=float,
        help="noise level of the model, gray levels; if unset, 15 for DEAL and that of "
        "the training for dictionaries; SAFI and MMR have none",
    )
    if name != "mri":
        parser.add_argument(
            "--white",
            type=float,
            help="value in the file that is white; if unset, 255 or 65535 for integers "
            "of 8 or 16 bit, and 1 for floating point",
        )
    parser.add_argument("--truth", help="file with the true image: print the PSNR")
    add_likelihood_option(parser)
    both = "deal_gray, deal_color for colour"
    add_model_options(parser, default="deal_gray" if name == "mri" else both)
    add_outcome_options(parser)
    parser.set_defaults(run=lambda args: _reconstruct(args, load))
    return parser


def _reconstruct(args: argparse.Namespace, load: Any) -> int:
    import torch

    from deepinv_deal.files import check_target, write_picture
    from deepinv_deal.problems.fitted import fitted

    split, likelihood = False, args.likelihood
    settings = likelihood.settings(getattr(args, "white", None))
    level = None if args.sigma_model is None else args.sigma_model / 255
    if likelihood.has_unit:
        # The image is in counts or the like, but the level is that of the model.
        level, settings["sigma"] = None, level
    if load is _mri:
        if likelihood.has_unit:
            raise ValueError(
                f"--likelihood {likelihood.kind} is for counts, and k-space holds "
                "none. Give gaussian, l1 or weights."
            )
        y, physics, like = _mri(args)
        model = make_model(args, complex_mode=args.complex_mode, **settings)
    else:
        like = _picture(args)
        model = make_model(args, like.x.shape[1], **settings)
        # The channels of a colour image one by one, if the filters are gray.
        split = channels_of(model) == 1
        y, physics = load(args, like.x.transpose(0, 1) if split else like.x)
    check_target(args.output, like)
    likelihood.check(y)
    physics = fitted(physics, y)  # kernels with a side of 1 or 2
    start = time.perf_counter()
    with torch.no_grad():
        x_hat, info = model(
            y, physics, sigma=level, lambda_reg=args.lambda_reg, return_info=True
        )
        seconds = time.perf_counter() - start
        first = physics.A_adjoint(y)
    if split:
        x_hat, first = x_hat.transpose(0, 1), first.transpose(0, 1)
    likelihood.doubt_rounding(args.output, x_hat, like)
    _write(args.output, x_hat, like, load is _mri, write_picture)
    converged = report(f"{args.input} -> {args.output}", info, seconds, likelihood)
    truth = _truth(args, x_hat, load is _mri)
    if args.figure:
        white = likelihood.shown_white(x_hat, getattr(args, "white", None))
        truth = None if truth is None else truth / white
        _draw(args, load is _mri, first / white, x_hat / white, truth, info)
    return 1 if args.strict and not converged else 0


def _write(path: str, x_hat: Any, like: Picture, is_mri: bool, write: Any) -> None:
    if is_mri:
        import torch

        x_hat = torch.complex(x_hat[:, :1], x_hat[:, 1:])
        if not path.lower().endswith((".npy", ".pt")):  # a picture: the magnitude
            x_hat = x_hat.abs()
            top = float(x_hat.max())
            print(f"White in {path} is a magnitude of {top:.6g}.")
            x_hat = x_hat / (top or 1.0)
    write(path, x_hat, like)


def _magnitude(x: Any) -> Any:
    return x.square().sum(1, keepdim=True).sqrt()


def _truth(args: argparse.Namespace, x_hat: Any, is_mri: bool) -> Any:
    """Reads the true image, if there is one, and prints the PSNR."""
    if not args.truth:
        return None
    import torch

    from deepinv_deal.evaluation import quality
    from deepinv_deal.files import read_array, read_picture

    if is_mri:
        array = torch.from_numpy(read_array(args.truth)).abs().float()
        x = array.reshape(1, 1, *array.shape[-2:])
        x_hat = _magnitude(x_hat)
        unit = float(x.max()) or 1.0
        x, x_hat, unit = x / unit, x_hat / unit, 1.0
    else:
        x = read_picture(args.truth, args.likelihood.white(args.white)).x
        unit = args.likelihood.shown_white(x, args.white)
    if x.shape != x_hat.shape:
        raise ValueError(
            f"--truth has shape {tuple(x.shape)}, the result {tuple(x_hat.shape)}."
        )
    scores = quality(x_hat / unit, x / unit)
    print("PSNR {:.2f} dB, SSIM {:.4f}".format(*scores))
    return x


def _draw(
    args: argparse.Namespace,
    is_mri: bool,
    first: Any,
    x_hat: Any,
    truth: Any,
    info: Any,
) -> None:
    from deepinv_deal.cli._figures import Panel, plot_reconstructions, save

    if is_mri:
        first, x_hat = _magnitude(first), _magnitude(x_hat)
        first, x_hat = first / first.max(), x_hat / x_hat.max()
    weight = float(info.lambda_reg[0])
    panel = Panel(f"lambda {weight:.3g}", truth, first, x_hat, info, "(adjoint)")
    save(plot_reconstructions([panel]), args.figure)


# -- operators -------------------------------------------------------------------


def _picture(args: argparse.Namespace) -> Picture:
    from deepinv_deal.files import read_picture

    picture = read_picture(args.input, args.likelihood.white(args.white))
    if len(picture.x) > 1:
        raise ValueError(
            f"{args.input} has {len(picture.x)} pages; reconstruct takes one at a time."
        )
    return picture


def _blur(args: argparse.Namespace, y: Tensor) -> tuple[Tensor, Any]:
    from deepinv.physics import Blur

    from deepinv_deal.evaluation import make_kernel

    _, kernel = make_kernel(args.kernel)
    return y, Blur(kernel, padding=args.padding)


def _inpainting(args: argparse.Namespace, y: Tensor) -> tuple[Tensor, Any]:
    from deepinv.physics import Inpainting

    size = (int(y.shape[-2]), int(y.shape[-1]))
    mask = _mask(args.mask, size, "the image")
    y = y.where(mask, 0)  # NaN, too, where nothing was measured
    return y, Inpainting((y.shape[1], *size), mask=mask.float()[None])


def _mask(path: str, size: tuple[int, int], what: str) -> Tensor:
    """Reads a mask, and checks that it has the size of what it masks."""
    from deepinv_deal.files import read_mask

    mask = read_mask(path)
    if mask.shape != size:
        raise ValueError(f"--mask has shape {tuple(mask.shape)}, {what} {size}.")
    return mask


def _downsampling(args: argparse.Namespace, y: Tensor) -> tuple[Tensor, Any]:
    from deepinv.physics import Downsampling

    from deepinv_deal.evaluation import make_kernel

    if args.factor < 1:
        raise ValueError(f"--factor must be at least 1, got {args.factor}.")
    size = (y.shape[1], *(n * args.factor for n in y.shape[-2:]))
    kernel = make_kernel(args.kernel)[1] if args.kernel else None
    return y, Downsampling(size, filter=kernel, factor=args.factor)


def _mri(args: argparse.Namespace) -> tuple[Any, Any, Picture]:
    import torch
    from deepinv.physics import MRI, MultiCoilMRI

    from deepinv_deal.files import Picture, read_array

    y = torch.from_numpy(read_array(args.input))
    expected = 3 if args.coil_maps else 2
    if not y.is_complex() or y.ndim != expected:
        raise ValueError(
            f"{args.input} must hold complex numbers of shape "
            f"{'(N, H, W)' if args.coil_maps else '(H, W); coils need --coil-maps'}, "
            f"got {y.dtype} of shape {tuple(y.shape)}."
        )
    y = y.to(torch.complex64)
    size = (int(y.shape[-2]), int(y.shape[-1]))
    if args.mask:
        mask = _mask(args.mask, size, "k-space")
    else:
        mask = (y != 0).reshape(-1, *size).any(0)
    if not mask.any():
        raise ValueError("Nothing was measured: k-space is zero everywhere.")
    y = y.where(mask, 0)
    if args.zero_frequency == "corner":
        # deepinv's transform has the origin of both domains in the middle.
        y = MRI.fft(torch.fft.ifft2(y, norm="ortho"), dim=(-2, -1))
        mask = torch.fft.fftshift(mask)
    y = torch.view_as_real(y).movedim(-1, 0)[None]  # (1, 2, [N,] H, W)
    mask = mask.float()
    if not args.coil_maps:
        return y, MRI(mask=mask, img_size=size), Picture(y)
    maps = torch.from_numpy(read_array(args.coil_maps)).to(torch.complex64)
    if maps.shape != y.shape[2:]:
        raise ValueError(
            f"--coil-maps have shape {tuple(maps.shape)}, k-space {tuple(y.shape[2:])}."
        )
    physics = MultiCoilMRI(mask=mask, coil_maps=maps, img_size=size)
    return y, physics, Picture(y)
