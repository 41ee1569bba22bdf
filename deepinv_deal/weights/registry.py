"""The weights that have names: those in this package, and the authors' own."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

from deepinv_deal._atomic import replacing
from deepinv_deal.weights.files import read_header

#: Where the repositories of the authors' files are.
BASE_URL = "https://raw.githubusercontent.com"

#: Seconds without an answer after which a download fails.
TIMEOUT = 30.0

#: Names that stand for two files, for gray and for colour images.
BY_CHANNELS = ("bundled", "download")


@dataclass(frozen=True)
class Named:
    """
    Weights that have a name; those in this package are the file ``NAME.safetensors``.

    :param str name: the name.
    :param str prior: name of the class of their prior.
    :param int level: noise level of the training in gray levels (of 255 for white);
        ``None``: the model takes a noise level.
    :param int in_channels: image channels, which decide where several have the name.
    :param str alias: another name, which several may have.
    """

    name: str
    prior: str
    level: int | None = None
    in_channels: int = 1
    alias: str | None = None


@dataclass(frozen=True, kw_only=True)
class Official(Named):
    """
    A file of the authors, with a name and pinned by commit and content.

    :param str repository: repository on GitHub.
    :param str commit: commit.
    :param str path: the file in the repository.
    :param str blob: git's id of the content.
    :param str licence: licence of the repository; ``None``: it states none.
    """

    repository: str
    commit: str
    path: str
    blob: str
    licence: str | None

    @property
    def url(self) -> str:
        """The address of the file."""
        return f"{BASE_URL}/{self.repository}/{self.commit}/{quote(self.path)}"

    @property
    def cached(self) -> Path:
        """Where the file is kept, in torch's hub folder."""
        from torch.hub import get_dir

        name = f"deepinv_deal_{self.prior}_{self.name}_{self.blob[:8]}.pth"
        return Path(get_dir()) / "checkpoints" / name


BUNDLED = (
    Named("deal_gray", "DEALPrior", alias="bundled"),
    Named("deal_gray_64", "DEALPrior"),
    Named("deal_gray_128", "DEALPrior"),
    Named("deal_color", "DEALPrior", in_channels=3, alias="bundled"),
    *(Named(f"mmr_{n}", "MMRPrior", n) for n in (5, 15, 25)),
    *(Named(f"safi_{n}", "SAFIPrior", n) for n in (5, 15, 25)),
    *(Named(f"cpr_{n}", "SmoothPlusSparsePrior", n) for n in (5, 25)),
    *(Named(f"ncpr_{n}", "SmoothPlusSparsePrior", n) for n in (5, 25)),
    Named("patch_25", "PatchSynthesisPrior", 25),
)

_L1_PATHS = (
    "exps/sigma{level}/64_2_7_1e-3_{variant}/checkpoints/checkpoint_best_epoch.pth"
)

#: The authors' repositories: prior, repository, commit, licence, pattern of the paths,
#: and the files: what follows "download" in the name, level, variant and blob id.
_SOURCES = (
    (
        "DEALPrior",
        "mehrsapo/DEAL",
        "4eec8298750ffebb3848e87e412c62aff6a9f411",
        "MIT",
        "trained_models/deal_{variant}.pth",
        (
            ("", None, "gray", "a586e50fb384f9ff107a5593f91478bd840831cc"),
            ("", None, "color", "ad07f22573e1852662e62ea239f2c30eec7c73ac"),
        ),
    ),
    (
        "SAFIPrior",
        "mehrsapo/MMR_SAFI",
        "578864543ea83e8f461127bbde69050a2cda3d0b",
        "MIT",
        _L1_PATHS,
        (
            ("_5", 5, "relaxed", "dfc2971722d105a6de0bd2f6f6a5c4c07fbab44d"),
            ("_15", 15, "relaxed", "15f59f8b1a8f9b69c50bbc92c7f1ac68c77676c9"),
            ("_25", 25, "relaxed", "358108421f8808c9c72e36dcb954978274b3e33b"),
        ),
    ),
    (
        "MMRPrior",
        "mehrsapo/MMR_SAFI",
        "578864543ea83e8f461127bbde69050a2cda3d0b",
        "MIT",
        _L1_PATHS,
        (
            ("_5", 5, "mm", "46a5b8eb0f96cf4ca210e98d5c271a525ff50314"),
            ("_15", 15, "mm", "726a59ff90b2750b079fc3f719303958fc20ccae"),
            ("_25", 25, "majorized", "ba8efac2ba6fb0e725458c24d561922733aa93da"),
        ),
    ),
    (
        "SmoothPlusSparsePrior",
        "StanislasDucotterd/Smooth_Plus_Sparse_Model",
        "967701097c569e9a0468b0cd90f800e21cdcc657",
        None,
        "trained_models/sigma_{level}/{variant}/checkpoint.pth",
        (
            ("_cpr_5", 5, "CPR", "1fb6bb8297a4a89058b6c57cb42be17934cc9ff8"),
            ("_cpr_25", 25, "CPR", "bc87f047f294bc389569088dd7c2dfcea237529c"),
            ("_ncpr_5", 5, "NCPR", "ec6377e48e2ce815aff93a1cbc1f02cd3feaf498"),
            ("_ncpr_25", 25, "NCPR", "4ca7bdca25699c28fed2fe0b5c8ddcaf13d65ed2"),
        ),
    ),
    (
        "PatchSynthesisPrior",
        "StanislasDucotterd/Dictionnary_Learning",
        "20bc5d4c31c2633bdcedcad4f693ebd0e3871464",
        None,
        "trained_models/sigma_{level}{variant}/checkpoints/best_checkpoint.pth",
        (
            ("_5", 5, "", "4426cefb6e88c3a53e5e2f8594d5f166bd2966f4"),
            ("_25", 25, "", "811cce7c753a810c22b4d92fb323f31ccd1e0812"),
            ("_5++", 5, "++", "02ac3b83ccad355a688f88f893ad77d9427c4a24"),
            ("_25++", 25, "++", "3cd0aef3be842a089067a692fe29430ad33ae133"),
        ),
    ),
)

OFFICIAL = tuple(
    Official(
        name=f"download{suffix}",
        prior=prior,
        level=level,
        in_channels=3 if variant == "color" else 1,
        repository=repository,
        commit=commit,
        path=pattern.format(level=level, variant=variant),
        blob=blob,
        licence=licence,
    )
    for prior, repository, commit, licence, pattern, files in _SOURCES
    for suffix, level, variant, blob in files
)


def names(prior: str) -> list[str]:
    """
    Returns the names of weights that a class of prior has.

    |sep|

    :Example:

    >>> from deepinv_deal.weights import names
    >>> names("MMRPrior")
    ['mmr_5', 'mmr_15', 'mmr_25', 'download_5', 'download_15', 'download_25']

    :param str prior: name of the class.
    """
    own = [entry for entry in (*BUNDLED, *OFFICIAL) if entry.prior == prior]
    every = [entry.name for entry in own] + [e.alias for e in own if e.alias]
    return list(dict.fromkeys(every))


def _named(name: str) -> list[Named]:
    """Returns all weights of a name."""
    return [e for e in (*BUNDLED, *OFFICIAL) if name in (e.name, e.alias)]


def owner(pretrained: str | os.PathLike[str]) -> str:
    """
    Returns the name of the class of prior whose weights a name or file holds.

    |sep|

    :Example:

    >>> from deepinv_deal.weights import owner
    >>> owner("deal_gray"), owner("download_cpr_25")
    ('DEALPrior', 'SmoothPlusSparsePrior')

    :param str pretrained: a name, or the path of a ``.safetensors`` file.
    :raises ValueError: if it does not say it, or several classes have the name.
    :raises FileNotFoundError: if the file does not exist.
    """
    name = os.fspath(pretrained)
    priors = sorted({entry.prior for entry in _named(name)})
    if len(priors) == 1:
        return priors[0]
    if Path(name).suffix == ".safetensors":
        return read_header(_existing(name))["prior"]
    reason = f", but is a name for {', '.join(priors)}" if priors else ""
    raise ValueError(
        f"pretrained={name!r} does not say which model it is for{reason}. Bundled "
        f"weights are {', '.join(e.name for e in BUNDLED)}; files of this package are "
        ".safetensors."
    )


def find(
    pretrained: str | os.PathLike[str], prior: str, in_channels: int = 1
) -> tuple[Path, int | None]:
    """
    Returns the file of a name or path, downloaded where the name says so.

    :param str pretrained: one of :func:`names`, or the path of a ``.safetensors`` or
        ``.pth`` file.
    :param str prior: name of the class of prior.
    :param int in_channels: decides where a name stands for several files.
    :return: the file, and the noise level in gray levels that the registry knows.
    :raises ValueError: for an unknown name, or one of another class.
    :raises FileNotFoundError: if the file does not exist.
    :raises OSError: if a download fails.
    """
    name = os.fspath(pretrained)
    named = _named(name)
    own = [entry for entry in named if entry.prior == prior]
    if len(own) > 1:
        channels = [entry.in_channels for entry in own]
        own = [entry for entry in own if entry.in_channels == in_channels]
        if not own:
            raise ValueError(
                f"in_channels must be {' or '.join(map(str, channels))} for "
                f"pretrained={name!r}, got {in_channels}. Others need weights of their "
                "own."
            )
    if own:
        entry = own[0]
        if isinstance(entry, Official):
            return download(entry), entry.level
        return Path(__file__).parent / f"{entry.name}.safetensors", entry.level
    if named:
        others = " or ".join(dict.fromkeys(entry.prior for entry in named))
        raise ValueError(
            f"pretrained={name!r} holds weights of a {others}, not of a {prior}."
        )
    if Path(name).suffix not in (".safetensors", ".pth", ".pt"):
        known = "".join(f"{choice!r}, " for choice in names(prior))
        raise ValueError(
            f"pretrained={name!r} is unknown. Give {known}None (random weights), or "
            "the path of a .safetensors or .pth file."
        )
    return _existing(name), None


def _existing(name: str) -> Path:
    """Returns the path of a weights file; a missing one is an error that names it."""
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"The weights file {name!r} does not exist.")
    return path


def download(entry: Official) -> Path:
    """
    Returns a file of the authors, fetched once and checked whenever it is used.

    :param Official entry: the file.
    :return: where it is, in torch's hub folder.
    :raises OSError: if it is not there and cannot be fetched.
    :raises ValueError: if what was fetched has another content.
    """
    target, url = entry.cached, entry.url
    if target.is_file() and blob_id(target.read_bytes()) == entry.blob:
        return target
    try:
        with urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()
    except (OSError, HTTPException) as error:
        bundled = [e.name for e in BUNDLED if e.prior == entry.prior]
        raise OSError(
            f"The authors' weights could not be downloaded from {url}: {error}. "
            f"Without network, get that file elsewhere and place it at {target}, or "
            f"take bundled weights: {', '.join(map(repr, bundled))}."
        ) from error
    if blob_id(content) != entry.blob:
        raise ValueError(
            f"The file at {url} is not the official one: its content has the git blob "
            f"id {blob_id(content)}, expected {entry.blob}. Nothing was loaded."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_bytes(content)
    return target


def blob_id(content: bytes) -> str:
    """
    Returns git's id of a file.

    :param bytes content: what is in it.
    """
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
