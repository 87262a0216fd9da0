"""Figures of generated images in Inception's features, from statistics streamed over batches and processes.

Mean and covariance are kept, not features; the Frechet distance itself is `vision.metrics.frechet_between`. A figure
means something only together with its protocol: which reference, which labels, how many samples.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from driftfield.training import UserError, derive_seed
from driftfield.training.distributed import world_size
from vision.metrics import Gaussian
from vision.npz import ArrayInfo, npz_arrays, read_npz_array

ProtocolName = Literal["release", "adm"]
LabelRule = Literal["balanced", "random"]

FULL_COUNT: Final = 50_000  # samples of every published figure
SCORE_SPLITS: Final = 10
SHUFFLE_SEED: Final = 2020  # of numpy's RandomState, whose stream is frozen for good
KID_SUBSETS: Final = 100
KID_SUBSET_SIZE: Final = 1000
SPATIAL_STATISTICS: Final = ("mu_s", "sigma_s")  # in ADM's references
ASYMMETRY: Final = 1e-6  # of a covariance, relative to its largest entry: what rounding to float32 leaves


class Protocol(NamedTuple):
    """What a figure is measured against, and for which labels.

    Args:
        labels: "balanced": sample i has class i mod the number of classes, so 50 of each at 50,000, as ImageNet's
            validation set; "random": uniform, a function of (seed, i).
        statistics: names of mean and covariance in the reference, in order of preference.
        foreign: an array that only the other protocol's reference has.
        title: the reference in words.
    """

    labels: LabelRule
    statistics: tuple[tuple[str, str], ...]
    foreign: str
    title: str


PROTOCOLS: Final[Mapping[ProtocolName, Protocol]] = {
    "release": Protocol(
        labels="balanced",
        statistics=(("ref_mu", "ref_sigma"), ("mu", "sigma")),
        foreign=SPATIAL_STATISTICS[0],
        title="the drifting release's and MeanFlow's statistics of ImageNet 256",
    ),
    "adm": Protocol(
        labels="random",
        statistics=(("mu", "sigma"),),
        foreign="ref_mu",
        title="ADM's VIRTUAL_imagenet256_labeled.npz",
    ),
}


class Reference(NamedTuple):
    """Statistics of real images, with the SHA-256 of their file; `spatial` is of sFID, None where there is none."""

    path: Path
    sha256: str
    gaussian: Gaussian
    spatial: Gaussian | None


class RealImages(NamedTuple):
    """Real images in an npz file, for what statistics do not suffice: `arr_0` uint8 [num, H, W, 3]."""

    path: Path
    sha256: str
    num: int


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits."""

    mean: float
    std: float


class KernelDistance(NamedTuple):
    """Kernel Inception Distance: mean and standard deviation over subsets of `subset_size` samples."""

    mean: float
    std: float
    subset_size: int


class StreamedGaussian:
    """Mean and covariance of features that come in batches, in float64.

    Batches, and processes, are joined by the update of Chan, Golub and LeVeque (1979), which subtracts means first: no
    figure is lost where features lie far from the origin.

    Args:
        num_features: F.
        device: where the sums are kept; the features must be there.

    >>> stream = StreamedGaussian(1)
    >>> stream.update(torch.tensor([[0.0]]))
    >>> stream.update(torch.tensor([[2.0], [4.0]]))
    >>> stream.gaussian()
    Gaussian(mean=tensor([2.], dtype=torch.float64), covariance=tensor([[4.]], dtype=torch.float64))
    """

    def __init__(self, num_features: int, *, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._mean = torch.zeros(num_features, dtype=torch.float64, device=device)  # [F]
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)  # [F, F]

    def update(self, features: Tensor) -> None:
        """Take in features `[B, F]`.

        Raises:
            ValueError: they have another shape or are not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise ValueError(f"features must be [B, {len(self._mean)}], found {list(features.shape)}")
        if not len(features):
            return
        unusable = int((~torch.isfinite(features).all(1)).sum())
        if unusable:
            raise ValueError(f"features must be finite, found NaN or infinity in {unusable} of {len(features)} rows")
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        apart = mean - self._mean
        total = self.count + len(features)
        self._scatter += centred.T @ centred + torch.outer(apart, apart) * (self.count * len(features) / total)
        self._mean += apart * (len(features) / total)
        self.count = total

    def reduce(self) -> None:
        """Join what all processes took in; every process then holds the same."""
        if world_size() == 1:
            return
        counted = torch.tensor(float(self.count), dtype=torch.float64, device=self._mean.device)
        weighted = self._mean * counted
        total = counted.clone()
        dist.all_reduce(total)
        dist.all_reduce(weighted)
        mean = weighted / total
        apart = self._mean - mean
        self._scatter += torch.outer(apart, apart) * counted
        dist.all_reduce(self._scatter)
        self._mean, self.count = mean, int(total)

    def gaussian(self) -> Gaussian:
        """Mean `[F]` and unbiased covariance `[F, F]`.

        Raises:
            ValueError: fewer than two rows came.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, found {self.count}")
        return Gaussian(self._mean, self._scatter / (self.count - 1))


class StreamedInceptionScore:
    """Inception Score (Salimans et al. 2016) of logits that come in batches, in float64.

    exp(mean KL(p(y|x) || p(y))) of each split, whose mean and standard deviation are reported. Samples are dealt to the
    splits by torch-fidelity's permutation, and only the splits' sums of p and of p log p are kept.

    Args:
        count: samples in all, of all processes.
        num_logits: classes K.
        splits: number of splits.
        device: where the sums are kept; the logits must be there.

    Raises:
        ValueError: there are fewer samples than splits.

    >>> stream = StreamedInceptionScore(4, num_logits=4, splits=1)
    >>> stream.update(1000 * torch.eye(4), first_index=0)
    >>> round(stream.score().mean, 9)
    4.0
    """

    def __init__(
        self, count: int, *, num_logits: int, splits: int = SCORE_SPLITS, device: torch.device | str = "cpu"
    ) -> None:
        if count < splits:
            raise ValueError(f"an Inception Score of {splits} splits needs as many samples, found {count}")
        bounds = [i * count // splits for i in range(splits + 1)]
        split_of = torch.empty(count, dtype=torch.int64)
        order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count))
        split_of[order] = torch.arange(splits).repeat_interleave(torch.tensor(bounds).diff())
        self._split_of = split_of.to(device)  # [count]
        # For each split: how many samples, the sum of p, the sum of p log p.
        self._sums = torch.zeros(splits, num_logits + 2, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, *, first_index: int) -> None:
        """Take in logits `[B, K]` of the samples `first_index` to `first_index + B`."""
        log_p = logits.double().log_softmax(1)  # [B, K]
        p = log_p.exp()
        rows = torch.cat((torch.ones_like(p[:, :1]), p, (p * log_p).sum(1, keepdim=True)), dim=1)  # [B, K + 2]
        splits = self._split_of[first_index : first_index + len(logits)]
        self._sums += functional.one_hot(splits, len(self._sums)).double().T @ rows

    def reduce(self) -> None:
        """Join what all processes took in; every process then holds the same."""
        if world_size() > 1:
            dist.all_reduce(self._sums)

    def score(self) -> InceptionScore:
        """Mean and standard deviation over the splits.

        Raises:
            ValueError: not every sample came once.
        """
        count = self._sums[:, :1]
        if int(count.sum()) != len(self._split_of):
            raise ValueError(f"expected logits of {len(self._split_of)} samples, found {int(count.sum())}")
        means = self._sums[:, 1:] / count
        marginal = means[:, :-1]  # p(y) of each split
        scores = (means[:, -1] - torch.special.xlogy(marginal, marginal).sum(1)).exp()
        return InceptionScore(scores.mean().item(), scores.std(correction=0).item())


def kernel_distance(real: Tensor, generated: Tensor) -> KernelDistance:
    """Kernel Inception Distance (Binkowski et al. 2018) by torch-fidelity: 100 subsets, kernel (x·y / F + 1)^3.

    Args:
        real: features `[n, F]`.
        generated: features `[m, F]`.

    Returns:
        Unbiased, so that it may lie slightly below zero; of subsets of 1000, or of the smaller set if it has fewer.
    """
    from torch_fidelity import metric_kid  # takes seconds to import

    size = min(KID_SUBSET_SIZE, len(real), len(generated))
    found = metric_kid.kid_features_to_metric(
        generated.double(),
        real.double(),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=size,
        rng_seed=SHUFFLE_SEED,
        verbose=False,
    )
    return KernelDistance(found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD], size)


def fid_name(count: int) -> str:
    """What a Frechet distance of so many samples may be called.

    >>> fid_name(50_000), fid_name(5_000), fid_name(1_234)
    ('FID-50k', 'FID-5k', 'FID-1234')
    """
    return f"FID-{count // 1000}k" if count % 1000 == 0 else f"FID-{count}"


def sample_labels(rule: LabelRule, indices: range, *, num_classes: int, seed: int) -> Tensor:
    """Classes of samples by their indices: no class depends on how many samples are made, or by whom.

    Args:
        rule: of the protocol.
        indices: of the samples.
        num_classes: classes.
        seed: of random labels.

    Returns:
        int64 `[len(indices)]`.

    >>> sample_labels("balanced", range(3, 9), num_classes=5, seed=0).tolist()
    [3, 4, 0, 1, 2, 3]
    """
    if rule == "balanced":
        return torch.tensor(indices) % num_classes
    return torch.tensor([derive_seed(seed, "label", index) % num_classes for index in indices])


def describe_labels(rule: LabelRule, count: int, num_classes: int) -> str:
    """The label rule in words, for the record.

    >>> describe_labels("balanced", 50_000, 1000)
    'balanced: i mod 1000, 50 of each class'
    >>> describe_labels("balanced", 2_500, 1000)
    'balanced: i mod 1000, 2 or 3 of each class'
    """
    if rule == "random":
        return f"random: uniform over {num_classes} classes, a function of (seed, i)"
    each, rest = divmod(count, num_classes)
    return f"balanced: i mod {num_classes}, {f'{each} or {each + 1}' if rest else each} of each class"


def open_reference(
    path: Path, *, protocol: ProtocolName, num_features: int, num_spatial: int, expected_sha256: str | None = None
) -> Reference:
    """Read a protocol's reference statistics, hash the file, and refuse what cannot be them.

    Args:
        path: npz file.
        protocol: whose reference it is.
        num_features: F of the network.
        num_spatial: spatial features of the network, for sFID.
        expected_sha256: of the file; None takes any.

    Raises:
        UserError: the file is absent, damaged, another one than expected, or does not hold this protocol's statistics.
    """
    digest = _sha256(path, "reference", expected_sha256)
    arrays = _arrays(path, "reference")
    rules = PROTOCOLS[protocol]
    if rules.foreign in arrays:
        raise UserError(
            f"reference: protocol={protocol} expects {rules.title}, found {path} with {rules.foreign}, the mark of "
            "another protocol's reference: figures of the two are not comparable"
        )
    names = next((pair for pair in rules.statistics if arrays.keys() >= set(pair)), None)
    if names is None:
        wanted = " or ".join("/".join(pair) for pair in rules.statistics)
        raise UserError(f"reference: expected arrays {wanted} in {path}, found {', '.join(arrays) or 'none'}")
    has_spatial = arrays.keys() >= set(SPATIAL_STATISTICS)
    return Reference(
        path,
        digest,
        _read_gaussian(path, arrays, names, num_features),
        _read_gaussian(path, arrays, SPATIAL_STATISTICS, num_spatial) if has_spatial else None,
    )


def open_real_images(path: Path, *, at_most: int) -> RealImages | None:
    """Look at the real images of an npz file, `arr_0` uint8 [n, H, W, 3]; None if it has no `arr_0`.

    Args:
        path: npz file.
        at_most: how many of them are used.

    Raises:
        UserError: the file is absent or damaged, or its `arr_0` is no images.
    """
    digest = _sha256(path, "reference_images", None)
    info = _arrays(path, "reference_images").get("arr_0")
    if info is None:
        return None
    if info.dtype != np.uint8 or len(info.shape) != 4 or info.shape[3] != 3:
        raise UserError(f"reference_images: expected arr_0 as uint8 [n, H, W, 3] in {path}, found {_words(info)}")
    return RealImages(path, digest, min(info.shape[0], at_most))


def gather_rows(rows: Tensor) -> Tensor:
    """Rows `[n, ...]` of all processes, in order of their ranks, in every process; n may differ among them."""
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(counts))
    padded = torch.cat((rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])))
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([theirs[: int(count)] for theirs, count in zip(everyone, counts, strict=True)])


def _sha256(path: Path, key: str, expected: str | None) -> str:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{key}: expected an npz file, found {path}: {error.strerror}") from error
    if expected is not None and found != expected.lower():
        raise UserError(f"{key}: expected SHA-256 {expected}, found {found} of {path}")
    return found


def _arrays(path: Path, key: str) -> dict[str, ArrayInfo]:
    try:
        return npz_arrays(path)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def _read_gaussian(path: Path, arrays: Mapping[str, ArrayInfo], names: tuple[str, str], size: int) -> Gaussian:
    for name, shape in zip(names, ((size,), (size, size)), strict=True):
        if arrays[name].shape != shape or arrays[name].dtype.kind != "f":
            raise UserError(
                f"reference: expected {name} as real numbers {list(shape)} in {path}, found {_words(arrays[name])}"
            )
    try:
        mean, covariance = (torch.from_numpy(read_npz_array(path, name)).double() for name in names)
    except ValueError as error:
        raise UserError(f"reference: {error}") from error
    _check_statistics(path, mean, covariance)
    return Gaussian(mean, covariance)


def _check_statistics(path: Path, mean: Tensor, covariance: Tensor) -> None:
    """Refuse what is no mean and covariance: one bad entry would silently spoil the distance."""
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError(f"reference: expected finite statistics in {path}, found NaN or infinity")
    asymmetry = float((covariance - covariance.T).abs().max())
    if asymmetry > ASYMMETRY * float(covariance.abs().max()) or bool((covariance.diagonal() < 0).any()):
        raise UserError(f"reference: expected a covariance in {path}, found a matrix that is none")


def _words(info: ArrayInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"
