"""What any training of this project needs: configuration, run folder, checkpoints, averages, seeds, schedule, log."""

from driftfield.training.checkpoint import Checkpoint, CheckpointError, Loaded, checkpoint_steps, read_checkpoint
from driftfield.training.config import load_config, read_config, to_yaml
from driftfield.training.distributed import (
    any_process,
    barrier,
    is_main,
    process_group,
    rank,
    require_equal,
    share,
    sum_gradients,
    world_size,
)
from driftfield.training.ema import EMA
from driftfield.training.errors import UserError
from driftfield.training.faults import fault_point
from driftfield.training.interrupt import StopRequest
from driftfield.training.loop import CHECKPOINTS, Action, Stopped, Trainable, run_loop, run_to_results
from driftfield.training.optimizer_state import OptimizerState, load_optimizer, optimizer_state
from driftfield.training.program import run_program
from driftfield.training.progress import Progress
from driftfield.training.run_folder import RunFolder, RunFolderError, is_same_run
from driftfield.training.runlog import RunLog, read_log
from driftfield.training.schedule import warmup_constant
from driftfield.training.schema import ConfigError, from_plain, option, to_plain
from driftfield.training.seeding import derive_seed, generator, seed_everything
from driftfield.training.update import MAX_REJECTED_STEPS, Update

__all__ = [
    "CHECKPOINTS",
    "MAX_REJECTED_STEPS",
    "EMA",
    "Action",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Loaded",
    "OptimizerState",
    "Progress",
    "RunFolder",
    "RunFolderError",
    "RunLog",
    "StopRequest",
    "Stopped",
    "Trainable",
    "Update",
    "UserError",
    "any_process",
    "barrier",
    "checkpoint_steps",
    "derive_seed",
    "fault_point",
    "from_plain",
    "generator",
    "is_main",
    "is_same_run",
    "load_config",
    "load_optimizer",
    "optimizer_state",
    "option",
    "process_group",
    "rank",
    "read_checkpoint",
    "read_config",
    "read_log",
    "require_equal",
    "run_loop",
    "run_program",
    "run_to_results",
    "seed_everything",
    "share",
    "sum_gradients",
    "to_plain",
    "to_yaml",
    "warmup_constant",
    "world_size",
]
