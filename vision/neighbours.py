"""Show generated images, each beside the real training images nearest to it (Fig. 6): `python -m vision.neighbours`.

A generator that copies shows the same image twice. What is near depends on the space: raw pixels, the features of a
judge, or those of any encoder. Writes a picture, a row per generated image, and a JSON file with the real images'
numbers, classes and distances.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from driftfield.training import Progress, UserError, option, run_program
from driftfield.training.atomic_file import write_json
from driftfield.training.device import Device, choose_device
from vision.config import CONFIG_DIR, TrainConfig
from vision.data import RealSamples, to_uint8
from vision.encoders import load_encoder
from vision.evaluate import MODEL, config_of_run, judged_splits, load_judge
from vision.features import Encoder
from vision.generator import ImageGenerator
from vision.pictures import GAP_GREY, save_grid
from vision.real import load_real, load_tokenizer
from vision.sample import sample
from vision.tokenizer import Tokenizer

Embed = Callable[[Tensor], Tensor]

FAMILIES: Final = "b"  # mean and standard deviation of each map: where something is in the image does not count
PIXELS: Final = "pixels"
JUDGE: Final = "judge"


@dataclass(kw_only=True)
class NeighboursConfig:
    """Keys of `python -m vision.neighbours`."""

    run_dir: Path = option("folder of a finished run of vision.train")
    space: str = option("where distances are taken: pixels, judge, or mae:FOLDER, convnextv2, resnet50:FILE ...")
    labels: tuple[int, ...] = option("class of each generated image; empty: one of each of the first ten", min=0)
    num_neighbours: int = option("real images beside each", min=1)
    guidance_scale: float = option("α", min=1)
    seed: int = option("seed of noise and style, and of how the real samples are read", min=0)
    batch_size: int = option("real samples at once", min=1)
    out: Path | None = option("picture to write, .png; null: neighbours.png in run_dir")
    device: Device = option("where to compute")


class Neighbours(NamedTuple):
    """The real samples nearest to each generated one, nearest first."""

    ids: Tensor  # [N, k] int64, positions in the real set
    distances: Tensor  # [N, k]


@torch.no_grad()
def nearest_real(
    generated: Tensor,
    real: RealSamples,
    embed: Embed,
    *,
    k: int,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], None] = lambda _: None,
) -> Neighbours:
    """Go once through the real samples, keeping the k nearest to each generated one; equally near ones in their order.

    Args:
        generated: samples `[N, C, H, W]`.
        real: read at its first visits, in order.
        embed: samples `[B, C, H, W]` to vectors `[B, D]` whose Euclidean distance is taken.
        k: neighbours of each.
        seed: of reading.
        batch_size: real samples at once.
        progress: called with the number of real samples after each batch.

    Raises:
        ValueError: there are fewer than k real samples, or a vector is not finite.
    """
    if k > len(real):
        raise ValueError(f"expected at least {k} real samples, found {len(real)}")
    vectors = _finite("a generated sample", embed(generated))  # [N, D]
    ids = torch.empty(len(vectors), 0, dtype=torch.int64, device=vectors.device)
    distances = vectors.new_empty(len(vectors), 0)
    for visits in torch.arange(len(real)).split(batch_size):
        found = _finite("a real sample", embed(real.read(visits, seed=seed)))  # [b, D]
        apart = torch.cdist(vectors, found, compute_mode="donot_use_mm_for_euclid_dist")  # [N, b]
        distances, order = torch.cat((distances, apart), dim=1).sort(dim=1, stable=True)
        ids = torch.cat((ids, visits.to(ids.device).expand(len(vectors), -1)), dim=1).gather(1, order)
        ids, distances = ids[:, :k], distances[:, :k]
        progress(len(visits))
    return Neighbours(ids.cpu(), distances.cpu())


def embed_pixels(samples: Tensor) -> Tensor:
    """Samples `[B, C, H, W]` as vectors `[B, C * H * W]`.

    >>> embed_pixels(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 48])
    """
    return samples.flatten(1)


def encoder_embedding(encoder: Encoder, device: torch.device) -> Embed:
    """Samples to what an encoder makes of them: mean and spread of every map, each as a unit vector, side by side.

    Maps differ in scale by orders of magnitude; as unit vectors they count alike, and half the squared distance is the
    sum of one minus the cosine over all maps.

    Args:
        encoder: frozen, on the device.
        device: where to compute.
    """

    def embed(samples: Tensor) -> Tensor:
        features = encoder.features(samples.to(device), families=FAMILIES).values()
        return torch.cat([functional.normalize(feature.flatten(1).float(), dim=1) for feature in features], dim=1)

    return embed


def save_panel(generated: Tensor, neighbours: Tensor, path: Path) -> None:
    """Write a row per generated image: itself, a gap, and its neighbours, nearest first.

    Args:
        generated: uint8 `[N, C, H, W]`.
        neighbours: uint8 `[N, k, C, H, W]`.
        path: the PNG file; its folder must exist.

    Raises:
        OSError: the disk refuses.
    """
    gap = torch.full_like(generated, GAP_GREY)
    rows = torch.cat((generated[:, None], gap[:, None], neighbours), dim=1)  # [N, k + 2, C, H, W]
    save_grid(rows.flatten(0, 1), path, columns=rows.shape[1])


def main(config: NeighboursConfig) -> int:
    """Sample, search, and write picture and figures."""
    trained = config_of_run(config.run_dir)
    device = choose_device(config.device)
    tokenizer = load_tokenizer(trained.tokenizer, device)
    real = load_real(trained.data, tokenizer)
    try:
        model = ImageGenerator.from_pretrained(config.run_dir / MODEL).to(device)
        labels = torch.tensor(config.labels or range(min(10, model.num_classes)))
        generated = sample(model, labels, guidance_scale=config.guidance_scale, seed=config.seed)
        embed = _embedding(config.space, trained, tokenizer, device)
        with Progress(len(real)) as progress:
            near = nearest_real(
                generated,
                real,
                embed,
                k=config.num_neighbours,
                seed=config.seed,
                batch_size=config.batch_size,
                progress=progress.update,
            )
        found = real.read(near.ids.flatten(), seed=config.seed)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"run_dir {config.run_dir}, space {config.space}: {error}") from error
    path = config.out or config.run_dir / "neighbours.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = _to_pictures(found, tokenizer).unflatten(0, near.ids.shape)
        save_panel(_to_pictures(generated, tokenizer), pictures, path)
        write_json(path.with_suffix(".json"), _record(config, labels, near, real))
    except OSError as error:
        raise UserError(f"out: expected a place that can be written, found {path}: {error.strerror}") from error
    agreed = float((real.labels[near.ids] == labels[:, None]).double().mean())
    print(
        f"{len(labels)} generated images, each beside the nearest {config.num_neighbours} of {len(real)} real ones in "
        f"{config.space}; {agreed:.0%} of these are of the class asked for: {path}"
    )
    return 0


def _embedding(space: str, trained: TrainConfig, tokenizer: Tokenizer | None, device: torch.device) -> Embed:
    if space == PIXELS:
        return lambda samples: embed_pixels(samples).to(device)
    if space == JUDGE:
        return load_judge(trained.judge, *judged_splits(trained), device).features
    return encoder_embedding(load_encoder(space, tokenizer=tokenizer).to(device), device)


@torch.no_grad()
def _to_pictures(samples: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """Bytes `[B, C, H, W]` of samples, latents decoded."""
    if tokenizer is not None:
        device = next(tokenizer.parameters()).device
        samples = tokenizer.decode(samples.to(device)).cpu()
    return to_uint8(samples)


def _record(config: NeighboursConfig, labels: Tensor, near: Neighbours, real: RealSamples) -> dict[str, object]:
    rows = [
        {
            "label": label,
            "real": [
                {"id": number, "label": int(real.labels[number]), "distance": distance}
                for number, distance in zip(ids, distances, strict=True)
            ],
        }
        for label, ids, distances in zip(labels.tolist(), near.ids.tolist(), near.distances.tolist(), strict=True)
    ]
    return {
        "space": config.space,
        "guidance_scale": config.guidance_scale,
        "seed": config.seed,
        "real": real.fingerprint,
        "rows": rows,
    }


def _finite(what: str, vectors: Tensor) -> Tensor:
    if not torch.isfinite(vectors).all():
        raise ValueError(f"expected finite vectors, found NaN or infinity for {what}")
    return vectors


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, NeighboursConfig, config_dir=CONFIG_DIR, config_name="neighbours", description=__doc__ or "")
    )
