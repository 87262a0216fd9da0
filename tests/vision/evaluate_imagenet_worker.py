"""One of the processes of test_evaluate_imagenet, as torchrun starts them, and the network that both use.

Usage: python evaluate_imagenet_worker.py OUT [key=value ...]: streams its share of fixed features and logits and writes
what all of them give to OUT-RANK.npz, then runs `vision.evaluate_imagenet` with a small network in Inception's place.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from driftfield.training import run_program
from driftfield.training.distributed import process_group, rank, world_size
from vision import evaluate_imagenet as program
from vision.config import CONFIG_DIR
from vision.fid import StreamedGaussian, StreamedInceptionScore, gather_rows
from vision.inception import InceptionOutput

UNEVEN = (0, 23, 40)  # bounds of the shares


class FeatureNetwork:
    """Six features and five logits of an image's pixels and its squares; its first four pixels are the spatial ones."""

    num_features = 6
    num_logits = 5
    num_spatial = 4
    sha256 = "stand-in"

    def __call__(self, images: Tensor) -> InceptionOutput:
        pixels = images.flatten(1).double() / 255
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(pixels.shape[1] * 2, 11, generator=draw, dtype=torch.float64) / pixels.shape[1] ** 0.5
        output = torch.cat((pixels, pixels.square()), dim=1) @ weight
        return InceptionOutput(output[:, :6].float(), 3 * output[:, 6:].float(), pixels[:, :4].float())


def rows() -> Tensor:
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 5


def stream(mine: slice) -> dict[str, np.ndarray]:
    """Statistics of the features and the score of the logits, this process taking in its share."""
    gaussian, score = StreamedGaussian(3), StreamedInceptionScore(40, num_logits=3, splits=4)
    for index in range(mine.start, mine.stop, 5):
        batch = rows()[index : min(index + 5, mine.stop)]
        gaussian.update(batch)
        score.update(batch, first_index=index)
    gaussian.reduce()
    score.reduce()
    mean, covariance = gaussian.gaussian()
    return {
        "mean": mean.numpy(),
        "covariance": covariance.numpy(),
        "score": np.array(score.score()),
        "rows": gather_rows(rows()[mine]).numpy(),
    }


def main(out: Path, arguments: list[str]) -> int:
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        if world_size() != 2:
            raise RuntimeError(f"expected two processes, found {world_size()}")
        np.savez(f"{out}-{rank()}.npz", **stream(slice(UNEVEN[rank()], UNEVEN[rank() + 1])))
    program.load_inception = lambda path, device: FeatureNetwork()
    return run_program(
        program.main,
        program.EvaluateImageNetConfig,
        config_dir=CONFIG_DIR,
        config_name="evaluate_imagenet",
        description="",
        arguments=arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
