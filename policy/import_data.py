"""Convert demonstrations of any known format to ours: `python -m policy.import_data source=FILE out=FOLDER`.

Sources: Diffusion Policy's zarr, BlockPush's npy, the kitchen's npy and mjl, robomimic's HDF5, LeRobot v3.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from driftfield.training import UserError, option, run_program
from policy.demonstrations import Format, load_demonstrations

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs" / "policy"


@dataclass(kw_only=True)
class ImportConfig:
    """Keys of `python -m policy.import_data`; those of a format, where null, are as that format's reader has them."""

    source: Path = option("file or folder of the demonstrations")
    out: Path = option("folder to be made")
    format: Format = option("whose format; auto: by what is there", "auto")
    observation: Literal["state", "image"] | None = option(
        "what is seen: numbers alone, or cameras (diffusion_policy, robomimic, lerobot)", None
    )
    action: Literal["absolute", "delta"] | None = option("kind of actions wanted (robomimic, block_push)", None)
    stored_action: Literal["absolute", "delta"] | None = option("kind of the file's actions (robomimic)", None)
    mask: str | None = option("name of a list of demonstrations in the file (robomimic)", None)
    noise: bool | None = option("whether states get the readings' noise (kitchen's logs)", None)
    skip_damaged: bool | None = option("leave out files that cannot be read (kitchen's logs)", None)
    state_features: tuple[str, ...] | None = option("features that make the state (lerobot)", None)
    allow_missing_chunks: bool | None = option("missing chunks hold the fill value (diffusion_policy)", None)


def main(config: ImportConfig) -> int:
    """Convert, and say what."""
    if config.out.exists():
        raise UserError(f"out: expected the name of a folder to be made, found that {config.out} exists")
    names = [field.name for field in fields(config) if field.name not in ("source", "out", "format")]
    options = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    buffer = load_demonstrations(config.source, format=config.format, **options)
    try:
        buffer.save(config.out)
    except OSError as error:
        raise UserError(f"out: expected a folder that can be written, found {config.out}: {error.strerror}") from error
    print(f"{config.out}: {len(buffer)} episodes, {buffer.num_steps:,} steps, SHA-256 {buffer.fingerprint}")
    for key, array in buffer.arrays.items():
        print(f"  {key}: {array.dtype} {list(array.shape)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, ImportConfig, config_dir=CONFIG_DIR, config_name="import_data", description=__doc__ or "")
    )
