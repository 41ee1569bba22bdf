"""``deepinv-deal reconstruct``: measurements and operator from files."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deepinv_deal.cli._likelihood import add_likelihood_option
from deepinv_deal.cli._options import (
    Commands,
    add_model_options,
    add_outcome_options,
    add_slices_option,
    add_truth_option,
    add_truth_unit_options,
    add_white_option,
    channels_of,
    make_model,
    print_quality,
    read_truth,
    report,
    say,
    tell,
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
        "Cartesian MRI: complex k-space (H, W), or (N, H, W) with coil maps, of one "
        "slice or, with an axis in front, of several; HDF5 of fastMRI or ISMRMRD",
        _mri,
    )
    mri.add_argument(
        "--mask",
        help="file: nonzero where k-space was measured, (W,), (H, W) or (D, H, W); if "
        "unset, what the file says, or where y is not zero",
    )
    mri.add_argument(
        "--coil-maps", help="file with complex maps (N, H, W) or (D, N, H, W)"
    )
    mri.add_argument(
        "--crop",
        type=_size,
        metavar="HxW",
        help="write the middle of the images only; 'header': in the size that the file "
        "gives. If unset, they have the size of k-space",
    )
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
    add_slices_option(mri, "slices or frames", "reconstructed")


def _size(text: str) -> tuple[int, int] | str:
    if text == "header":
        return text
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: HxW, as 320x320, or 'header'."
        )
    return int(parts[0]), int(parts[1])


def _operator(
    operators: Commands[argparse.ArgumentParser], name: str, text: str, load: Any
) -> argparse.ArgumentParser:
    parser = operators.add_parser(
        name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("input", help="measurements: image, .npy, .npz:NAME, ...")
    parser.add_argument("output", help="image, .npy, .nii.gz, .h5, ...")
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
        add_white_option(parser)
    add_truth_option(parser)
    if name != "mri":
        add_truth_unit_options(parser)
    add_likelihood_option(parser)
    both = "deal_gray, deal_color for colour"
    add_model_options(parser, default="deal_gray" if name == "mri" else both)
    add_outcome_options(parser)
    parser.set_defaults(run=lambda args: _reconstruct(args, load))
    return parser


def _reconstruct(args: argparse.Namespace, load: Any) -> int:
    from deepinv_deal.files import check_target, forgets_place, write_picture

    split, likelihood, is_mri = False, args.likelihood, load is _mri
    settings = likelihood.settings(getattr(args, "white", None))
    level = None if args.sigma_model is None else args.sigma_model / 255
    if likelihood.has_unit:
        # The image is in counts or the like, but the level is that of the model.
        level, settings["sigma"] = None, level
    problems: Any  # a sequence of measurements and their physics
    if is_mri:
        if likelihood.has_unit:
            raise ValueError(
                f"--likelihood {likelihood.kind} is for counts, and k-space holds "
                "none. Give gaussian, l1 or weights."
            )
        problems, like = _mri(args)
        if args.slices is not None:
            problems = [problems.volume()]
            settings |= {"slices": args.slices, "show_progress_bar": None}
        model = make_model(args, complex_mode=args.complex_mode, **settings)
    else:
        like = _picture(args)
        if args.white == "max":
            args.white = like.white  # of the truth, too
        model = make_model(args, like.x.shape[1], **settings)
        # The channels of a colour image one by one, if the filters are gray.
        split = channels_of(model) == 1
        problems = [load(args, like.x.transpose(0, 1) if split else like.x)]
    if load is _downsampling:
        like.size = (like.x.shape[-2], like.x.shape[-1])
    result = like if is_mri else replace(like, x=_first(problems[0], split))
    check_target(args.output, result)
    if args.figure and len(like.x) > 1:
        raise ValueError(
            f"--figure draws one image; {args.input} has {len(like.x)} slices."
        )
    start = time.perf_counter()
    x_hat, infos = _solve(model, problems, level, args)
    seconds = time.perf_counter() - start
    if split:
        x_hat = x_hat.transpose(0, 1)
    if x_hat.ndim == 5:  # one volume
        x_hat = x_hat[0].movedim(1, 0)
    size = like.x.shape[-2:]
    if is_mri:
        x_hat = _middle(x_hat, size)
    likelihood.doubt_rounding(args.output, x_hat, like)
    _write(args.output, x_hat, like, is_mri, write_picture)
    if not is_mri and forgets_place(args.output, like):
        say([f"{args.output} does not keep where the voxels of {args.input} lie."])
    converged = report(f"{args.input} -> {args.output}", infos, seconds, likelihood)
    truth = _truth(args, x_hat, like, is_mri)
    if args.figure:
        first = _first(problems[0], split)
        first = _middle(first, size) if is_mri else first
        white = likelihood.shown_white(x_hat, getattr(args, "white", None))
        truth = None if truth is None else truth / white
        _draw(args, is_mri, first / white, x_hat / white, truth, infos[0])
    return 1 if args.strict and not converged else 0


def _solve(
    model: Any,
    problems: Sequence[tuple[Tensor, Any]],
    level: float | None,
    args: argparse.Namespace,
) -> tuple[Tensor, list[Any]]:
    """
    Solves problems one by one, with one intensity for all slices of a volume: that of
    the slice with the most energy, which is solved first.
    """
    import torch
    from tqdm import tqdm

    several = len(problems) > 1
    order = list(range(len(problems)))
    if several:
        energy = [float(y.square().sum()) for y, _ in problems]
        order.sort(key=energy.__getitem__, reverse=True)
    results, infos = {}, {}
    for i in tqdm(order, "Slices", disable=None if several else True):
        y, physics = problems[i]
        args.likelihood.check(y)
        physics = _fitted(physics, y)
        with torch.no_grad():
            results[i], infos[i] = model(
                y, physics, sigma=level, lambda_reg=args.lambda_reg, return_info=True
            )
        if several and model.scale == "auto":
            model.scale = float(infos[i].scale.max())
    slices = range(len(problems))
    return torch.cat([results[i] for i in slices]), [infos[i] for i in slices]


def _first(problem: tuple[Tensor, Any], split: bool) -> Tensor:
    """Returns what the adjoint makes of measurements, the channels in one image."""
    import torch

    y, physics = problem
    with torch.no_grad():
        first: Tensor = _fitted(physics, y).A_adjoint(y)
    return first.transpose(0, 1) if split else first


def _fitted(physics: Any, y: Tensor) -> Any:
    """Returns the physics for kernels with a side of 1 or 2, too."""
    from deepinv_deal.problems.fitted import fitted

    return fitted(physics, y)


def _middle(x: Tensor, size: Sequence[int]) -> Tensor:
    """Returns the middle of images; the origin of k-space stays in the middle."""
    top, left = (n // 2 - m // 2 for n, m in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


def _write(path: str, x_hat: Any, like: Picture, is_mri: bool, write: Any) -> None:
    from deepinv_deal.files import ARRAYS, IMAGES, suffix_of

    if is_mri:
        import torch

        x_hat = torch.complex(x_hat[:, :1], x_hat[:, 1:])
        if suffix_of(path) not in ARRAYS:  # these hold real numbers
            x_hat = x_hat.abs()
        if suffix_of(path) in IMAGES:
            top = float(x_hat.max())
            tell(f"White in {path} is a magnitude of {top:.6g}.")
            x_hat = x_hat / (top or 1.0)
        elif not x_hat.is_complex():
            tell(f"{path} holds magnitudes; .npy and .h5 hold complex images.")
    write(path, x_hat, like)


def _magnitude(x: Any) -> Any:
    return x.square().sum(1, keepdim=True).sqrt()


def _truth(args: argparse.Namespace, x_hat: Any, like: Any, is_mri: bool) -> Any:
    """Reads the true image, if there is one, and prints the PSNR."""
    if not args.truth:
        return None
    import torch

    from deepinv_deal.files import read_array

    if is_mri:
        array = torch.from_numpy(read_array(args.truth)).abs().float()
        x = array.reshape(-1, 1, *array.shape[-2:])
        x_hat = _magnitude(x_hat)
        unit = float(x.max()) or 1.0
        x, x_hat, unit = x / unit, x_hat / unit, 1.0
    else:
        x = read_truth(args, like)
        unit = args.likelihood.shown_white(x, args.white)
    print_quality(x_hat, x, unit)
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
    say(picture.notes)
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


class _Slices(Sequence["tuple[Tensor, Any]"]):
    """
    Measurements and physics of the slices of k-space.

    :param torch.Tensor y: k-space ``(D, [N,] H, W)``, complex.
    :param torch.Tensor mask: where it was measured, ``(D, H, W)``, boolean.
    :param torch.Tensor maps: coil maps ``(1 or D, N, H, W)``, if there are coils.
    :param bool corner: whether zero frequency is at the corner.
    """

    def __init__(self, y: Tensor, mask: Tensor, maps: Tensor | None, corner: bool):
        self.y, self.mask, self.maps, self.corner = y, mask, maps, corner

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: Any) -> Any:
        import torch
        from deepinv.physics import MRI, MultiCoilMRI

        if not 0 <= i < len(self):
            raise IndexError(i)
        mask = self.mask[i]
        y = self.y[i].where(mask, 0)
        if self.corner:
            # deepinv's transform has the origin of both domains in the middle.
            y = MRI.fft(torch.fft.ifft2(y, norm="ortho"), dim=(-2, -1))
            mask = torch.fft.fftshift(mask)
        y = torch.view_as_real(y).movedim(-1, 0)[None]  # (1, 2, [N,] H, W)
        size = (int(y.shape[-2]), int(y.shape[-1]))
        if self.maps is None:
            return y, MRI(mask=mask.float(), img_size=size)
        maps = self.maps[min(i, len(self.maps) - 1)]
        return y, MultiCoilMRI(mask=mask.float(), coil_maps=maps, img_size=size)

    def volume(self) -> tuple[Tensor, Any]:
        """Measurements and physics of all slices as one volume ``(1, 2, D, H, W)``."""
        import torch
        from deepinv.physics import LinearPhysics

        ys, slices = zip(*(self[i] for i in range(len(self))), strict=True)
        first = slices[0]
        stacked = {"mask": torch.cat([physics.mask for physics in slices])}
        if self.maps is not None:
            stacked["coil_maps"] = torch.cat([physics.coil_maps for physics in slices])
        batch = type(first)(img_size=self.y.shape[-2:], **stacked)

        def forward(x: Tensor, **_: Any) -> Tensor:
            measured: Tensor = batch.A(x[0].movedim(1, 0))
            return measured[None]

        def adjoint(y: Tensor, **_: Any) -> Tensor:
            images: Tensor = batch.A_adjoint(y[0])
            return images.movedim(0, 1)[None]

        return torch.cat(ys)[None], LinearPhysics(A=forward, A_adjoint=adjoint)


def _mri(args: argparse.Namespace) -> tuple[_Slices, Picture]:
    import torch

    from deepinv_deal.files import Picture, read_array, read_k_space

    k_space = read_k_space(args.input)
    say(k_space.notes)
    y = torch.from_numpy(k_space.y).to(torch.complex64)
    if not args.coil_maps and y.ndim == 4 and y.shape[1] == 1:
        y = y[:, 0]  # one coil
    axes = 3 if args.coil_maps else 2
    if y.ndim not in (axes, axes + 1):
        expected = "([D,] N, H, W)" if args.coil_maps else "([D,] H, W)"
        raise ValueError(
            f"{args.input} has shape {tuple(y.shape)}, {expected} was expected"
            f"{'' if args.coil_maps else '; coils need --coil-maps'}."
        )
    is_volume = y.ndim > axes
    y = y if is_volume else y[None]
    if is_volume and not args.coil_maps:
        say(
            [f"{args.input} has {len(y)} slices of one coil; coils need --coil-maps."]
            if len(y) > 1
            else []
        )
    depth, size = len(y), (int(y.shape[-2]), int(y.shape[-1]))
    if args.mask:
        mask = _k_space_mask(args.mask, depth, size)
    elif k_space.mask is not None:
        mask = _expanded(torch.from_numpy(k_space.mask), depth, size, args.input)
    else:
        mask = (y != 0).reshape(depth, -1, *size).any(1)
    empty = (~mask.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        which = f" in slices {empty}" if depth > 1 else ""
        raise ValueError(f"Nothing was measured{which}: k-space is zero everywhere.")
    maps = None
    if args.coil_maps:
        maps = torch.from_numpy(read_array(args.coil_maps)).to(torch.complex64)
        if maps.shape not in (y.shape, y.shape[1:]):
            shape = tuple(y.shape[0 if is_volume else 1 :])
            raise ValueError(
                f"--coil-maps have shape {tuple(maps.shape)}, k-space {shape}."
            )
        maps = maps.reshape(-1, *y.shape[1:])
    crop = args.crop
    if crop == "header" and k_space.image_size is None:
        raise ValueError(f"{args.input} gives no size of the image. Give --crop HxW.")
    if crop == "header":
        crop = k_space.image_size
    elif crop is None and k_space.image_size not in (None, size):
        height, width = k_space.image_size
        say(
            [
                f"Images have the size of k-space, {size[0]}x{size[1]}; {args.input} "
                f"says {height}x{width}: --crop header cuts them."
            ]
        )
    crop = crop or size
    if crop[0] > size[0] or crop[1] > size[1]:
        raise ValueError(
            f"--crop {crop[0]}x{crop[1]} is more than the image, {size[0]}x{size[1]}."
        )
    like = Picture(
        torch.empty(depth, 1, *crop),
        layout="PHW" if is_volume else "HW",
        affine=k_space.affine,
    )
    return _Slices(y, mask, maps, args.zero_frequency == "corner"), like


def _k_space_mask(path: str, depth: int, size: tuple[int, int]) -> Tensor:
    from deepinv_deal.files import read_mask

    return _expanded(read_mask(path), depth, size, path)


def _expanded(mask: Tensor, depth: int, size: tuple[int, int], path: str) -> Tensor:
    """Returns a mask of lines, of a slice or of all slices as ``(D, H, W)``."""
    if mask.shape not in (size[1:], size, (depth, *size)):
        raise ValueError(
            f"--mask has shape {tuple(mask.shape)}, k-space {(depth, *size)} ({path})."
        )
    return mask.expand(depth, *size)
