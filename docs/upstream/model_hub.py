"""
What the Hugging Face Hub needs of the model cards ``deepinv_deal/weights/*.md``.

``python docs/upstream/model_hub.py headers`` writes the headers of the cards anew, with
the figures of their tables. ``python docs/upstream/model_hub.py commands OWNER`` prints
the commands that upload weights and cards, and runs none of them.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "deepinv_deal" / "weights"
CARDS = sorted(WEIGHTS.glob("*.md"))

HEADER = """\
---
library_name: deepinv-deal
pipeline_tag: image-to-image
license: bsd-3-clause
tags:
- deepinv
- inverse-problems
- image-denoising
- image-reconstruction
- interpretable
{paper}datasets:
- BSDS500
metrics:
- psnr
- ssim
model-index:
- name: {name}
  results:
{results}---
"""

RESULT = """\
  - task:
      type: image-to-image
      name: Gaussian denoising, noise level {level}/255
    dataset:
      type: {dataset}
      name: {images}
      config: noise-{level}
    metrics:
    - type: psnr
      name: PSNR (dB)
      value: {psnr}
    - type: ssim
      name: SSIM
      value: {ssim}
"""


def body(card: Path) -> str:
    """Returns a card without its header."""
    return card.read_text().split("---\n", 2)[2]


def header(card: Path) -> str:
    """Returns the header of a card, with the figures of its table."""
    text = body(card)
    dataset, images = _images(text)
    results = "".join(
        RESULT.format(
            level=level, psnr=psnr, ssim=ssim, dataset=dataset.lower(), images=images
        )
        for level, psnr, ssim in figures(card)
    )
    paper = re.search(r"arXiv (\d{4}\.\d{5})", text)
    return HEADER.format(
        name=card.stem,
        paper=f"- arxiv:{paper[1]}\n" if paper else "",
        results=results,
    )


def figures(card: Path) -> list[tuple[str, str, str]]:
    """Returns noise level in gray levels, PSNR and SSIM, as the table has them."""
    text = body(card)
    text = text[text.index("## Results") :]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    rows = {row[0]: row[1:] for row in table}
    if "noise level" in rows:  # one column for each
        levels = [level.removesuffix("/255") for level in rows["noise level"]]
        return list(zip(levels, rows["PSNR (dB)"], rows["SSIM"], strict=True))
    level = re.search(r"noise\s+of\s+(\d+)/255", text)
    assert level is not None, f"{card} does not say which noise its table is for"
    psnr, ssim = rows[card.stem][:2]
    return [(level[1], psnr, ssim)]


def _images(text: str) -> tuple[str, str]:
    """Returns the data set of the table, and which images of it."""
    found = re.search(
        r"## Results\s+(?:Central (\d+) x \d+ pixels of )?[Tt]en images of (C?BSD68)",
        text,
    )
    assert found is not None, "the results do not begin with their images"
    side, dataset = found.groups()
    part = f"central {side} x {side} pixels of ten images" if side else "ten images"
    return dataset, f"{dataset}, {part}{'' if dataset == 'CBSD68' else ', gray'}"


def commands(owner: str) -> list[str]:
    """Returns the commands that upload all weights, each to its own repository."""
    lines = []
    for card in CARDS:
        repository = f"{owner}/deepinv-deal-{card.stem.replace('_', '-')}"
        for file, name in (
            (card.with_suffix(".safetensors"), f"{card.stem}.safetensors"),
            (card, "README.md"),
        ):
            path = str(file.relative_to(ROOT))
            lines.append(shlex.join(["hf", "upload", repository, path, name]))
    return lines


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    tasks.add_parser("headers", help="write the headers of the cards")
    tasks.add_parser("commands", help="print the uploads").add_argument("owner")
    args = parser.parse_args()
    if args.task == "commands":
        print("\n".join(commands(args.owner)))
        return
    for card in CARDS:
        card.write_text(header(card) + body(card))


if __name__ == "__main__":
    main()
