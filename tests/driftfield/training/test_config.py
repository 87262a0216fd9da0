"""Rows E1-E3: a configuration that says anything wrong stops the program before it does anything."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from driftfield.training import (
    ConfigError,
    UserError,
    from_plain,
    load_config,
    option,
    read_config,
    run_program,
    to_plain,
    to_yaml,
)


@dataclass(kw_only=True)
class Generator:
    depth: int = option("layers", 3, min=1, max=64)
    width: int = option("channels", 64, min=8)


@dataclass(kw_only=True)
class Config:
    run_dir: Path = option("folder of the run")
    steps: int = option("training steps", 100, min=1)
    learning_rate: float = option("peak learning rate", 2e-4, above=0)
    guidance: Literal["none", "scale"] = option("how guidance enters", "scale")
    temperatures: tuple[float, ...] = option("kernel temperatures", (0.02, 0.05, 0.2), above=0)
    betas: tuple[float, float] = option("AdamW's betas", (0.9, 0.95), min=0, below=1)
    compile: bool = option("compile the generator", False)
    name: str = option("name of the run", "toy")
    data_dir: Path | None = option("where the images are", None)
    weights: dict[str, float] = option("weight per feature", {"pixels": 1.0}, min=0)
    generator: Generator = field(default_factory=Generator)

    def __post_init__(self) -> None:
        if self.steps < self.generator.depth:
            raise ValueError(f"steps: expected at least generator.depth={self.generator.depth}, found {self.steps}")


FILES = {
    "train.yaml": "defaults:\n  - _self_\n  - generator: small\nrun_dir: runs/toy\nlearning_rate: 1e-3\n",
    "generator/small.yaml": "depth: 2\n",
    "generator/large.yaml": "depth: 12\nwidth: 768\n",
    "experiment/paper.yaml": "# Table 8, latent B/2\ndefaults:\n  - override /generator: large\nsteps: 200_000\n",
    "experiment/quick.yaml": "# A smoke run\nsteps: 5\nrun_dir: runs/${name}\n",
}


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "configs"


def load(config_dir: Path, *overrides: str) -> Config:
    return load_config(Config, config_dir=config_dir, config_name="train", overrides=overrides)


def test_dataclass_then_file_then_experiment_then_command_line(config_dir: Path) -> None:
    plain = load(config_dir)
    assert (plain.steps, plain.learning_rate, plain.generator) == (100, 1e-3, Generator(depth=2, width=64))
    paper = load(config_dir, "experiment=paper")
    assert (paper.steps, paper.learning_rate, paper.generator) == (200_000, 1e-3, Generator(depth=12, width=768))
    mine = load(config_dir, "steps=7", "experiment=paper", "generator.depth=5", "learning_rate=3")
    assert (mine.steps, mine.learning_rate, mine.generator) == (7, 3.0, Generator(depth=5, width=768))
    assert load(config_dir, "generator=large").generator == Generator(depth=12, width=768)


def test_values_have_the_declared_types(config_dir: Path) -> None:
    config = load(
        config_dir,
        "temperatures=[1,2.5]",
        "betas=[0,0.5]",
        "compile=true",
        "data_dir=~/my data",
        "weights={mae: 2}",
        "name='a=b, c'",
        "guidance=none",
    )
    assert config.temperatures == (1.0, 2.5) and all(type(value) is float for value in config.temperatures)
    assert config.betas == (0.0, 0.5) and config.compile is True and config.guidance == "none"
    assert config.data_dir == Path.home() / "my data" and config.run_dir == Path("runs/toy")
    assert config.weights == {"pixels": 1.0, "mae": 2.0} and config.name == "a=b, c"
    assert load(config_dir, "data_dir=null").data_dir is None
    assert load(config_dir, "generator={width: 8}").generator == Generator(depth=2, width=8)


def test_keys_can_refer_to_each_other(config_dir: Path) -> None:
    assert load(config_dir, "experiment=quick", "name=mine").run_dir == Path("runs/mine")


def test_the_working_directory_stays(config_dir: Path) -> None:
    before = Path.cwd()
    load(config_dir)
    assert Path.cwd() == before


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stepz=5", "unknown key 'stepz'; did you mean 'steps'?"),
        ("generator.dpth=5", "unknown key 'generator.dpth'; did you mean 'generator.depth'?"),
        ("depth=5", "unknown key 'depth'; did you mean 'generator.depth'?"),
        ("zzz=5", "unknown key 'zzz'; --help lists the valid ones"),
        ("steps.x=5", "unknown key 'steps.x': steps is a single value"),
        ("+steps=5", "'+steps=5': expected key=value, without '+', '~' or '@': the keys are fixed, so steps=..."),
        ("++extra=5", "'++extra=5': expected key=value, without '+', '~' or '@': the keys are fixed, so extra=..."),
        ("~steps", "'~steps': expected key=value, without '+', '~' or '@': the keys are fixed, so steps=..."),
        ("steps", "'steps': expected key=value"),
        ("=5", "'=5': expected key=value"),
        ("steps=abc", "steps: expected an integer >= 1, found 'abc'"),
        ("steps=1.5", "steps: expected an integer >= 1, found 1.5"),
        ("steps=true", "steps: expected an integer >= 1, found True"),
        ("steps=-5", "steps: expected an integer >= 1, found -5"),
        ("steps=", "steps: expected an integer >= 1, found ''"),
        ("steps=null", "steps: expected an integer >= 1, found None"),
        ("steps=[1]", "steps: expected an integer >= 1, found [1]"),
        ("steps=???", "steps: expected an integer >= 1, found no value"),
        ("run_dir=???", "run_dir: expected a path, found no value"),
        ("run_dir=''", "run_dir: expected a path, found ''"),
        ("steps=2", "steps: expected at least generator.depth=3, found 2"),
        ("learning_rate=nan", "learning_rate: expected a number > 0, found nan"),
        ("learning_rate=inf", "learning_rate: expected a number > 0, found inf"),
        ("learning_rate=0", "learning_rate: expected a number > 0, found 0.0"),
        ("learning_rate='1e-3'", "learning_rate: expected a number > 0, found '1e-3'"),
        ("compile=1", "compile: expected true or false, found 1"),
        ("name=5", "name: expected text, found 5"),
        ("guidance=scales", "guidance: expected one of none, scale, found 'scales'; did you mean 'scale'?"),
        ("temperatures=[0.1,-1]", "temperatures[1]: expected a number > 0, found -1.0"),
        ("temperatures=0.1", "temperatures: expected a list of a number > 0, found 0.1"),
        ("temperatures=0.1,0.2", "'temperatures=0.1,0.2': expected one value; a list is temperatures=[a,b]"),
        ("betas=[0.1]", "betas: expected a list [a number >= 0 and < 1, a number >= 0 and < 1], found [0.1]"),
        ("betas=[0.1,1]", "betas[1]: expected a number >= 0 and < 1, found 1.0"),
        ("weights.mae=-1", "weights.mae: expected a number >= 0, found -1.0"),
        ("weights=3", "weights: expected names with a number >= 0 each, found 3"),
        ("generator=3", "generator: expected one of large, small; found '3'"),
        ("generator.depth=65", "generator.depth: expected an integer >= 1 and <= 64, found 65"),
        ("experiment=papre", "experiment: expected one of paper, quick; found 'papre'; did you mean 'paper'?"),
        ("generator._target_=os.getcwd", "generator._target_: a configuration holds values and names no code"),
        ("name=${nmae}", "'nmae' not found"),
        ("name=${oc.env:DRIFTFIELD_NOT_SET}", "'DRIFTFIELD_NOT_SET' not found"),
        ("hydra.run.dir=x", "unknown key 'hydra'"),
    ],
)
def test_one_sentence_for_each_mistake(config_dir: Path, override: str, sentence: str) -> None:
    overrides = ["generator.depth=3", override] if override == "steps=2" else [override]
    with pytest.raises(ConfigError) as refused:
        load(config_dir, *overrides)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz: 5\n", "unknown key 'stepz'; did you mean 'steps'?"),
        ("generator: {dpth: 5}\n", "unknown key 'generator.dpth'"),
        ("steps: 5\nsteps: 6\n", "duplicate key steps"),
        ("steps: -1\n", "steps: expected an integer >= 1, found -1"),
        ("steps: [\n", "train.yaml: "),
        ("generator: 5\n", "generator: expected keys and values, found 5"),
        ("weights: {a: {_target_: os.getcwd}}\n", "weights.a._target_: a configuration holds values and names no code"),
        ("temperatures: [{_target_: os.getcwd}]\n", "temperatures.0._target_: "),
        ("name: {_target_: os.getcwd, _partial_: true}\n", "name._target_: "),
        ("name: !!python/object/apply:os.getcwd []\n", "train.yaml: "),
        ("defaults:\n  - nowhere: this\n", "nowhere"),
    ],
)
def test_mistakes_in_a_file(config_dir: Path, text: str, sentence: str) -> None:
    (config_dir / "train.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load(config_dir, "run_dir=here")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_value_that_nothing_sets_is_asked_for(config_dir: Path) -> None:
    (config_dir / "train.yaml").write_text("steps: 5\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="run_dir: expected a path, found no value"):
        load(config_dir)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trian"):
        load_config(Config, config_dir=tmp_path, config_name="trian", overrides=[])


def test_yaml_and_back(config_dir: Path, tmp_path: Path) -> None:
    config = load(config_dir, "learning_rate=1e-7", "name='1e-3'", "temperatures=[]", "weights={a: 3}")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert read_config(path) == to_plain(config)
    assert from_plain(Config, read_config(path)) == config


def test_a_stored_configuration_reads_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIFTFIELD_SECRET", "canary")
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: x\nname: ${oc.env:DRIFTFIELD_SECRET}\n", encoding="utf-8")
    data = read_config(path)
    assert data["name"] == "${oc.env:DRIFTFIELD_SECRET}"
    assert from_plain(Config, data).name == "${oc.env:DRIFTFIELD_SECRET}"


@pytest.mark.parametrize(
    "content",
    [
        b"a: 1\na: 2\n",
        b"- 1\n",
        b"5\n",
        b"\xff\xfe\x00",
        b"a: [",
        b"a: &b [1]\nc: *b\n",
        b"a: ${",
        b"a: !!python/name:os.system x\n",
        b"[" * 100_0000,
    ],
)
def test_a_stored_configuration_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: expected"):
        read_config(path)


def test_defaults_are_not_shared_between_configurations() -> None:
    first = from_plain(Config, {"run_dir": "x"})
    first.weights["pixels"] = 5.0
    assert from_plain(Config, {"run_dir": "x"}).weights == {"pixels": 1.0}


# Programs


def run(config_dir: Path, *arguments: str, main: Any = lambda config: None) -> int:
    return run_program(
        main, Config, config_dir=config_dir, config_name="train", description="Train a toy.", arguments=arguments
    )


def test_a_program_gets_its_configuration_and_gives_its_exit_code(config_dir: Path) -> None:
    seen: list[Config] = []
    assert run(config_dir, "steps=9", main=seen.append) == 0
    assert seen == [load(config_dir, "steps=9")]
    assert run(config_dir, main=lambda config: 143) == 143


def test_help_shows_keys_values_meanings_and_experiments(config_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config_dir, "--help", "experiment=paper", main=pytest.fail) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Train a toy.\n")
    for words in (
        ["steps=200000", "training steps (an integer >= 1)"],
        ["generator.depth=12", "layers (an integer >= 1 and <= 64)"],
        ['guidance="scale"', "how guidance enters (one of none, scale)"],
        ["data_dir=null", "where the images are (a path or null)"],
        ["paper", "Table 8, latent B/2"],
        ["quick", "A smoke run"],
    ):
        assert any(all(word in line for word in words) for line in shown.splitlines()), words


def test_print_config_can_be_read_back(config_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config_dir, "--print-config", "steps=9", main=pytest.fail) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert from_plain(Config, read_config(path)) == load(config_dir, "steps=9")


@pytest.mark.parametrize("arguments", [["stepz=1"], ["--stpes=1"], ["--help", "experiment=none"], ["-v"]])
def test_a_user_s_mistake_is_one_line_and_code_2(
    config_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(config_dir, *arguments, main=pytest.fail) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_a_user_s_error_inside_the_program_too(config_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Config) -> None:
        raise UserError("data_dir /x: expected images, found none")

    assert run(config_dir, main=main) == 2
    assert capsys.readouterr().err == "error: data_dir /x: expected images, found none\n"


def test_any_other_error_keeps_its_traceback(config_dir: Path) -> None:
    def main(config: Config) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(config_dir, main=main)


def test_ctrl_c_is_code_130(config_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Config) -> None:
        raise KeyboardInterrupt

    assert run(config_dir, main=main) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_configuration_type_that_can_not_be_checked_is_the_programmer_s_mistake() -> None:
    @dataclass
    class Wrong:
        value: int | str = 3

    with pytest.raises(TypeError, match=r"only union is X \| None"):
        from_plain(Wrong, {"value": 3})
