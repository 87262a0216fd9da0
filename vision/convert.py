"""Convert the authors' published weights to ours: `python -m vision.convert source=latent_L_sota out=FOLDER`.

The source is a name of the release, downloaded from the Hugging Face hub, or a folder with its metadata.json and
ema_params.msgpack; the result is a folder that `from_pretrained` takes. Every array is used exactly once, or nothing
is written and all that does not fit is listed.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from driftfield.training import UserError, option, run_program
from driftfield.training.pretrained import CONFIG_FILE, WEIGHTS_FILE
from vision.config import CONFIG_DIR
from vision.generator import ImageGenerator
from vision.mae import ResNetMAE
from vision.release import ARRAYS_FILE, METADATA_FILE, RELEASE_PREFIX, RELEASED, download_release
from vision.release_model import Converted, convert_release


@dataclass(kw_only=True)
class ConvertConfig:
    """Keys of `python -m vision.convert`."""

    source: str = option("folder with metadata.json and ema_params.msgpack, or a name of the release")
    out: Path = option("folder to write config.json and model.safetensors into")
    revision: str | None = option("commit, tag or branch of the release's repository; null: its newest")


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> Converted:
    """Convert a model of the release, whichever it is, as `convert_release` does."""
    return convert_release(source, out, models=(ImageGenerator, ResNetMAE))


def main(config: ConvertConfig) -> int:
    """Convert, and say what."""
    try:
        source = Path(config.source)
        if not source.is_dir():
            source = _download(config.source, config.revision)
        converted = convert(source, config.out)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"source: {error}") from error
    except OSError as error:
        raise UserError(f"out: expected a folder that can be written, found {config.out}: {error.strerror}") from error
    print(f"{converted.model}, {converted.num_parameters:,} parameters")
    print(f"read  {_size(converted.source)}, SHA-256 {converted.source_sha256}")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        print(f"wrote {_size(config.out / name)}")
    return 0


def _download(source: str, revision: str | None) -> Path:
    name = source.removeprefix(RELEASE_PREFIX)
    if name not in RELEASED:
        raise UserError(
            f"source: expected a folder with {METADATA_FILE} and {ARRAYS_FILE}, or one of {', '.join(RELEASED)}; "
            f"found {source!r}"
        )
    return download_release(name, revision=revision)


def _size(path: Path) -> str:
    return f"{path}, {path.stat().st_size:,} bytes"


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, ConvertConfig, config_dir=CONFIG_DIR, config_name="convert", description=__doc__ or "")
    )
