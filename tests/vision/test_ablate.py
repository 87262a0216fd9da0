"""`python -m vision.ablate`: tables compose, rows run, fail, are found again, and are written as what they are."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from driftfield.training import Stopped, StopRequest, UserError, load_config, run_program
from vision import ablate, evaluate, train
from vision.ablation import execute
from vision.ablation.plan import AblateConfig, BaseName, RowConfig, Run, run_of, runs_of, runs_of_equal_time
from vision.ablation.table import Outcome, Table, markdown, outcomes_of, training_rate
from vision.config import CONFIG_DIR, TrainConfig
from vision.metrics import EvaluationResult

TABLES = sorted(path.stem for path in (CONFIG_DIR / "table").glob("*.yaml"))
TINY = (
    "images=480", "labels_per_step=3", "generated_per_label=4", "positives_per_label=6", "unconditional_per_label=2",
    "queue.push_per_step=8", "warmup_images=24", "checkpoint_every_images=120", "log_every_images=24",
    "picture_every_images=480", "evaluate_images=100", "encoder.images=96", "encoder.batch_size=16",
    "encoder.warmup_images=16", "encoder.base_channels=4", "encoder.blocks=[1]", "generator.hidden_size=16",
    "generator.num_heads=2", "generator.cond_size=16", "generator.depth=1", "judge.epochs=1", "device=cpu",
)  # fmt: skip
BROKEN = RowConfig(overrides=("learning_rate=1e20",))


def load(table: str, *overrides: str) -> AblateConfig:
    words = [f"table={table}", *overrides]
    return load_config(AblateConfig, config_dir=CONFIG_DIR, config_name="ablate", overrides=words)


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judges")


def tiny(folder: Path, judges: Path, rows: dict[str, RowConfig], *, seeds: tuple[int, ...] = (0,)) -> AblateConfig:
    config = load("fields")
    config = replace(config, folder=folder / "tables", seeds=seeds, overrides=(*TINY, f"judge.folder={judges}"))
    return replace(config, table=replace(config.table, rows=rows))


# --- the tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["digits", "fashion_mnist"])
@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_every_table_is_a_training_that_vision_train_takes(table: str, base: BaseName) -> None:
    config = load(table, f"base={base}", "seeds=[0]")
    assert config.table.name == table and config.base.name == base
    runs = runs_of(config)
    assert [run.row for run in runs] == list(config.rows)
    trained = [run.config for run in runs if run.program == "vision.train"]
    shared = [*(run.folder for run in runs), *(each.encoder.run_dir for each in trained)]
    assert not any(path.is_relative_to(config.table_folder) for path in shared)  # the table's folder is its own
    assert not any(config.table_folder.is_relative_to(parent) for path in shared for parent in (path, path.parent))
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        assert run.config.data.name == base and run.config.seed == 0
        assert run.config.images == runs[0].config.images
        assert run.config.evaluate_images == runs[0].config.evaluate_images
        if run.program == "vision.train":
            assert run.config.evaluate_guidance_scale == runs[0].config.evaluate_guidance_scale
            assert run.config.images_per_step == runs[0].config.images_per_step  # so the steps are equally many too


def test_runs_are_shared_by_tables_and_encoders_by_rows_with_the_same_encoder() -> None:
    fields, features, encoders = (runs_of(load(name)) for name in ("fields", "features", "encoders"))
    assert fields[0].folder == features[0].folder == encoders[0].folder
    assert {run.config.encoder.run_dir for run in fields} == {fields[0].config.encoder.run_dir}
    by_row = {run.row: run.config.encoder.run_dir for run in features}
    assert by_row["(a)"] == by_row["(a, b)"] == by_row["(b)"] != by_row["(a-d) of 4 × 4 maps"]
    assert len({run.config.encoder.run_dir for run in encoders if run.seed == 0}) == len(load("encoders").rows)


def test_a_row_with_an_unknown_key_is_refused_before_any_work(tmp_path: Path, judges: Path) -> None:
    config = tiny(tmp_path, judges, {"default": RowConfig(), "typo": RowConfig(overrides=("loss.atraction=2",))})
    with pytest.raises(UserError, match=r"table fields, row 'typo': unknown key 'loss.atraction'.*loss.attraction"):
        ablate.main(config)
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize(
    ("overrides", "words"), [(["seeds=[]"], "seeds: expected one or more"), (["seeds=[1,1]"], "different numbers")]
)
def test_seeds_are_checked(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load("fields", *overrides)


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was started; commands run in this process, which spares each its imports."""
    programs = {"vision.train": (train.main, TrainConfig, "train")}
    programs["vision.evaluate"] = (evaluate.main, evaluate.EvaluateConfig, "evaluate")  # type: ignore[assignment]
    names: list[str] = []

    class InThisProcess:
        def __init__(self, command: Sequence[str], log: Path, _: object) -> None:
            assert command[:2] == [sys.executable, "-m"]
            main, schema, name = programs[command[2]]
            words = dict(word.split("=", 1) for word in command[3:])
            names.append(
                f"{command[2]} {Path(words['run_dir']).parent.name.split('-')[0]} {Path(words['run_dir']).name}"
            )
            with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
                self.returncode = run_program(
                    main, schema, config_dir=CONFIG_DIR, config_name=name, description="", arguments=command[3:]
                )

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(execute, "_start", InThisProcess)
    return names


def test_rows_are_run_once_and_a_failing_one_is_a_row_that_says_so(
    tmp_path: Path, judges: Path, started: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path, judges, {"default": RowConfig(), "diverges": BROKEN}, seeds=(0, 1))
    config = replace(config, table=replace(config.table, rows={"default": RowConfig()}), seeds=(0,))
    assert ablate.main(config) == 0
    assert started == ["vision.train default seed0"]
    config = replace(
        config, table=replace(config.table, rows={"default": RowConfig(), "diverges": BROKEN}), seeds=(0, 1)
    )
    assert ablate.main(config) == 0
    assert started[1:] == [
        f"vision.train {name}" for name in ("learning_rate_1e20 seed0", "default seed1", "learning_rate_1e20 seed1")
    ]
    folder = config.table_folder
    data = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    good = [each for each in data["equal_samples"] if each["row"] == "default"]
    bad = [each for each in data["equal_samples"] if each["row"] == "diverges"]
    assert [each["seed"] for each in good] == [each["seed"] for each in bad] == [0, 1]
    assert all(each["evaluation"] is None for each in bad)
    distances = []
    for each in good:
        own = json.loads((Path(each["run_dir"]) / "results.json").read_text(encoding="utf-8"))
        assert each["evaluation"] == own["evaluation"] and each["images"] == own["images_seen"] == 480
        distances.append(own["evaluation"]["frechet"])
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    real, default, diverges = (
        line for line in lines if line.startswith("| ") and "---" not in line and "variant" not in line
    )
    assert real.startswith("| 100 real training images |  | ")
    assert default.startswith(
        f"| default | 2 | {statistics.mean(distances):.2f} ± {statistics.stdev(distances):.2f} | "
    )
    assert diverges.startswith("| diverges | 0 | failed |")
    assert sum(line.startswith("- diverges, seed") for line in lines) == 2
    with Image.open(folder / "table.png") as picture:
        picture.load()
    assert "default, seed 1: Fréchet" in capfd.readouterr().out


def test_guidance_scales_are_judged_of_one_model(tmp_path: Path, judges: Path, started: list[str]) -> None:
    config = tiny(tmp_path, judges, {"default": RowConfig()})
    config = replace(config, table=replace(config.table, guidance_scales=(1.0, 2.5)))
    assert ablate.main(config) == 0 and ablate.main(config) == 0
    assert started == ["vision.train default seed0", "vision.evaluate default seed0"]
    lines = (config.table_folder / "table.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| default")]
    assert [row[0] for row in rows] == ["| default, α = 1", "| default, α = 2.5"]
    written = json.loads((config.table_folder / "table.json").read_text(encoding="utf-8"))["equal_samples"]
    assert [outcome["sampled"] for outcome in written] == ["α = 1", "α = 2.5"]
    assert written[0]["evaluation"]["frechet"] != written[1]["evaluation"]["frechet"]
    more = replace(config, table=replace(config.table, guidance_scales=(1.0, 4.0)))
    assert ablate.main(more) == 0
    assert len(started) == 4  # a training that is complete, and its model judged again


def stand_in(folder: Path, *commands: tuple[str, ...]) -> Run:
    """A run whose commands are other programs."""
    config = load_config(
        TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=[f"run_dir={folder / 'run'}"]
    )
    return Run("row", 0, "vision.train", config, commands, ())


def test_commands_run_one_after_another_until_one_fails(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text("{}", encoding="utf-8")
    good, bad = ("json.tool", str(tmp_path / "good.json")), ("json.tool", str(tmp_path / "absent.json"))
    ended = []
    with StopRequest() as stop:
        runs = [stand_in(tmp_path / "a", good, good), stand_in(tmp_path / "b", bad, good)]
        execute.execute(runs, 2, stop, lambda run, failure: ended.append((run.folder, failure)))
    failures = dict(ended)
    assert failures[tmp_path / "a" / "run"] is None
    assert "absent.json" in str(failures[tmp_path / "b" / "run"])
    assert runs[0].log.read_text(encoding="utf-8") == "{}\n{}\n"


def test_a_stop_is_passed_on_and_nothing_more_is_started(tmp_path: Path) -> None:
    sleep = ("timeit", "-n1", "-r1", "-s", "import time", "time.sleep(60)")

    class Stop:
        requested = False

    stop, start = Stop(), time.monotonic()
    runs = [stand_in(tmp_path / name, sleep) for name in "ab"]

    def ask(_: float) -> None:
        stop.requested = True
        real_sleep(0.01)

    real_sleep = time.sleep
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(execute.time, "sleep", ask)
        with pytest.raises(Stopped):
            execute.execute(runs, 1, stop, lambda *_: pytest.fail("a stopped run is not done"))  # type: ignore[arg-type]
    assert time.monotonic() - start < 30
    assert runs[0].log.exists() and not runs[1].log.exists()


def test_folder_of_another_run_is_refused_rather_than_a_failed_row(
    tmp_path: Path, judges: Path, started: list[str]
) -> None:
    config = tiny(tmp_path, judges, {"default": RowConfig()})
    (run,) = runs_of(config)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("seed: 5\n", encoding="utf-8")
    with pytest.raises(UserError, match="belongs to another run"):
        ablate.main(config)
    assert started == []


# --- equal time ---------------------------------------------------------------------------------------------------


def log(folder: Path, images_per_s: float, *, pause_s: float = 0.0) -> None:
    """A log of 1000 images a line, with a pause in the middle."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for line in range(9):
            second = 1000 * line / images_per_s + (pause_s if line > 4 else 0)
            stamp = f"2026-01-01T00:{int(second) // 60:02d}:{second % 60:06.3f}+00:00"
            file.write(json.dumps({"step": line, "samples_seen": 1000 * line, "time": stamp, "lambda": 1.0}) + "\n")


def test_speed_is_that_of_training_whatever_pauses_lay_between(tmp_path: Path) -> None:
    log(tmp_path / "run", 500.0, pause_s=600)
    assert training_rate(tmp_path / "run") == pytest.approx(500.0)
    assert training_rate(tmp_path / "absent") is None


def test_equal_time_gives_a_row_of_half_the_speed_half_the_images(tmp_path: Path, judges: Path) -> None:
    rows = {
        "default": RowConfig(),
        "slow": RowConfig(overrides=("loss.attraction=1.5",)),
        "same": RowConfig(overrides=("loss.attraction=2.0",)),
        "not run": RowConfig(overrides=("loss.repulsion=2.0",)),
    }
    config = replace(tiny(tmp_path, judges, rows, seeds=(0, 1)), equal="time")
    for name, rate in (("default", 100.0), ("slow", 50.0), ("same", 104.0)):
        log(run_of(config, name, 0).folder, rate)
    runs = runs_of_equal_time(config)
    assert [(run.row, run.seed, run.config.images) for run in runs] == [("slow", 0, 240), ("slow", 1, 240)]
    assert not {run.folder for run in runs} & {run.folder for run in runs_of(config)}


def test_a_rival_is_listed_in_every_way_that_it_is_sampled(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log(folder, 100.0)
    entries = [
        {"sampler": "euler", "evaluations": 10, "guidance_scale": 1.0, "evaluation": figures(3.0)._asdict()},
        {"sampler": "heun", "evaluations": 20, "guidance_scale": 2.0, "evaluation": figures(2.0)._asdict()},
    ]
    results = {"method": "flow_matching", "images_seen": 8000, "rows": entries}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    found = outcomes_of(folder, "flow matching", 0)
    assert [each.sampled for each in found] == ["euler, 10 evaluations", "heun, 20 evaluations, α = 2"]
    assert [each.evaluation and each.evaluation.frechet for each in found] == [3.0, 2.0]
    assert found[0].seconds == pytest.approx(80)


def figures(frechet: float) -> EvaluationResult:
    shares = dict.fromkeys(("precision", "recall", "coverage", "coverage_real", "coverage_pixels", "agreement"), 0.5)
    return EvaluationResult(
        **shares, frechet=frechet, frechet_floor=0.25, coverage_pixels_real=0.75, agreement_per_class=(0.5, None),
        n_generated=100, n_floor=100, n_reference=500, feature_space="toy", judge_accuracy=0.9,
    )  # fmt: skip


def test_equal_time_stands_beside_equal_samples() -> None:
    table = Table("fields", "Title", "digits", {}, {}, (0,), equal_time=True)
    samples = [
        Outcome("default", 0, "a", images=1000, images_per_s=100.0, drift_norm=0.5, evaluation=figures(1.0)),
        Outcome("slow", 0, "b", images=1000, images_per_s=50.0, drift_norm=0.5, evaluation=figures(2.0)),
    ]
    in_time = [Outcome("slow", 0, "c", images=500, evaluation=figures(3.0))]
    default, slow = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown(table, samples, in_time).splitlines()
        if line.startswith(("| default", "| slow"))
    )
    assert default[2] == "1.00" and default[-4:] == ["10", "1,000", "1.00", "0.500"]
    assert slow[2] == "2.00" and slow[-4:] == ["20", "500", "3.00", "0.500"]


# --- the real command ---------------------------------------------------------------------------------------------


def wait_for(path: Path, process: subprocess.Popen[str]) -> Iterator[None]:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        yield time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)  # of a machine that is busy; a minute otherwise
def test_killed_with_all_its_processes_and_stopped_it_goes_on_to_the_same_figures(tmp_path: Path, judges: Path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        quoted = ",".join(f'"{word}"' for word in (*TINY, f"judge.folder={judges}"))
        words = ["table=temperatures", f"folder={tmp_path / name}", "seeds=[0]", f"overrides=[{quoted}]"]
        return subprocess.Popen(
            [sys.executable, "-m", "vision.ablate", *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    process = start("disturbed")
    for _ in wait_for(tmp_path / "disturbed" / "digits" / "temperatures" / "table.md", process):
        pass
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = start("disturbed")
    second = tmp_path / "disturbed" / "digits" / "runs"
    while sum(1 for _ in second.glob("*/seed0/results.json")) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate()
    assert process.returncode == 143 and "the same command goes on from here" in said
    for name in ("disturbed", "whole"):
        process = start(name)
        said, _ = process.communicate()
        assert process.returncode == 0, said
    disturbed, whole = (
        json.loads((tmp_path / name / "digits" / "temperatures" / "table.json").read_text(encoding="utf-8"))
        for name in ("disturbed", "whole")
    )
    assert len(whole["equal_samples"]) == len(load("temperatures").rows)
    assert [each["evaluation"] for each in disturbed["equal_samples"]] == [
        each["evaluation"] for each in whole["equal_samples"]
    ]
