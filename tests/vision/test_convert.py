"""`python -m vision.convert`: every array used once, all that is wrong told at once, nothing executed."""

import hashlib
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from driftfield.training import run_program
from tests.vision.release_artifacts import (
    GOLDEN,
    flat,
    golden_mae,
    nchw,
    nested,
    packed,
    read_config,
    read_tree,
    write_artifact,
)
from vision import convert as program
from vision.config import CONFIG_DIR
from vision.convert import ConvertConfig, convert
from vision.generator import PRESETS, ImageGenerator
from vision.mae import ResNetMAE
from vision.release import RELEASED, Damaged, read_arrays
from vision.release_layout import generator_origins, mae_origins, their_shapes

LATENT = GOLDEN / "generator_latent"


def run(*arguments: str) -> int:
    return run_program(
        program.main, ConvertConfig, config_dir=CONFIG_DIR, config_name="convert", description="", arguments=arguments
    )


def changed_artifact(folder: Path, changes: dict[str, Any], **model_config: Any) -> Path:
    """The golden generator with other leaves (None: without them) and other numbers in its metadata."""
    leaves = {name: leaf for name, leaf in (flat(read_tree(LATENT)) | changes).items() if leaf is not None}
    return write_artifact(folder, kind="gen", model_config=read_config(LATENT) | model_config, tree=nested(leaves))


@pytest.mark.parametrize(("bfloat16", "attention_in_float32"), [(True, False), (True, True), (False, False)])
def test_rotary_angles_are_rounded_where_the_release_computed_them_in_bfloat16(
    bfloat16: bool, attention_in_float32: bool, tmp_path: Path
) -> None:
    source = changed_artifact(tmp_path / "source", {}, use_bf16=bfloat16, attn_fp32=attention_in_float32)
    convert(source, tmp_path / "model")
    generator = ImageGenerator.from_pretrained(tmp_path / "model")
    assert generator.config["rotary_in_bfloat16"] == (bfloat16 and not attention_in_float32)
    assert generator.config["attention_in_float32"] == attention_in_float32


def golden_array(name: str) -> np.ndarray:
    shape, dtype, content = msgpack.unpackb(flat(read_tree(LATENT))[name].data)
    return np.frombuffer(content, dtype).reshape(shape)


def samples_of(folder: Path) -> Tensor:
    with np.load(LATENT / "io.npz") as io, torch.no_grad():
        return ImageGenerator.from_pretrained(folder)(
            nchw(io["noise_nhwc"]),
            *(torch.from_numpy(io[key]) for key in ("class_labels", "cfg_scale", "style_indices")),
        )


def write_bytes(folder: Path, content: bytes) -> Path:
    path = folder / "ema_params.msgpack"
    path.write_bytes(content)
    return path


def test_says_what_it_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"source={LATENT}", f"out={tmp_path}") == 0
    model = ImageGenerator.from_pretrained(tmp_path)
    source, weights, config = LATENT / "ema_params.msgpack", tmp_path / "model.safetensors", tmp_path / "config.json"
    assert capsys.readouterr().out.splitlines() == [
        f"ImageGenerator, {sum(parameter.numel() for parameter in model.parameters()):,} parameters",
        f"read  {source}, 444,417 bytes, SHA-256 {hashlib.sha256(source.read_bytes()).hexdigest()}",
        f"wrote {weights}, {weights.stat().st_size:,} bytes",
        f"wrote {config}, {config.stat().st_size:,} bytes",
    ]


def test_writes_the_mae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = golden_mae("mae_pixel", tmp_path / "source")
    assert run(f"source={source}", f"out={tmp_path / 'mae'}") == 0
    assert capsys.readouterr().out.startswith("ResNetMAE, ")
    assert ResNetMAE.from_pretrained(tmp_path / "mae").config["patch_size"] == 8


@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_of_a_full_generator_has_one_origin(preset: str) -> None:
    with torch.device("meta"):
        model = ImageGenerator(**PRESETS[preset])
    assert_one_origin_each(model, list(generator_origins(depth=PRESETS[preset]["depth"], num_styles=32)))


@pytest.mark.parametrize("base_channels", [256, 640])
def test_every_tensor_of_a_full_mae_has_one_origin(base_channels: int) -> None:
    with torch.device("meta"):
        model = ResNetMAE(in_channels=4, base_channels=base_channels, num_classes=1000)
    assert_one_origin_each(model, list(mae_origins(blocks=(3, 4, 6, 3))))


def assert_one_origin_each(model: torch.nn.Module, origins: list[Any]) -> None:
    state = model.state_dict()
    assert sorted(origin.ours for origin in origins) == sorted(state)
    theirs = [name for origin in origins for name in origin.theirs]
    assert len(theirs) == len(set(theirs))
    numbers = [
        np.prod(shape) for origin in origins for shape in their_shapes(origin, state[origin.ours].shape).values()
    ]
    assert sum(numbers) == sum(tensor.numel() for tensor in state.values())


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = "LightningDiT_0/blocks_1"
    not_finite = golden_array("RMSNorm_0/weight").copy()
    not_finite[[3, 5]] = np.nan, np.inf
    changes = {
        "Embed_0/embedding": None,
        "surplus/weight": np.zeros(2, np.float32),
        "surplus/text": "words",
        f"{block}/TorchLinear_0/Dense_0/kernel": np.zeros((288, 48), np.float32),  # transposed
        f"{block}/TorchLinear_0/Dense_0/bias": np.zeros(288),
        "RMSNorm_0/weight": not_finite,
        "noise_embeds_0/embedding": packed([5, 48], "float32", b"1234"),
        "noise_embeds_1/embedding": packed([-5, 48], "float32", bytes(960)),
        "noise_embeds_2/embedding": packed([5, 48], "object", bytes(960)),
        "noise_embeds_3/embedding": packed([5, 48], "float32", bytes(960)).data,
        f"{block}/RMSNorm_0/weight": msgpack.ExtType(1, b"\x93"),
        f"{block}/RMSNorm_1/weight": msgpack.ExtType(3, bytes(8)),
    }
    source = changed_artifact(tmp_path / "source", changes)
    assert run(f"source={source}", f"out={tmp_path / 'out'}") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: source: {source}/ema_params.msgpack: expected the arrays of the ImageGenerator of metadata.json, "
        "found differences:",
        "  Embed_0/embedding: expected float32 [11, 48], found none",
        f"  {block}/RMSNorm_0/weight: expected float32 [48], found a damaged array (Unpack failed: incomplete input)",
        f"  {block}/RMSNorm_1/weight: expected float32 [48], found extension 3 instead of an array",
        f"  {block}/TorchLinear_0/Dense_0/bias: expected float32 [288], found dtype 'float64' [288]",
        f"  {block}/TorchLinear_0/Dense_0/kernel: expected float32 [48, 288], found float32 [288, 48]",
        "  RMSNorm_0/weight: expected finite numbers, found 2 that are not",
        "  noise_embeds_0/embedding: expected float32 [5, 48], found 4 bytes for float32 [5, 48], which takes 960",
        "  noise_embeds_1/embedding: expected float32 [5, 48], found an array of shape [-5, 48]",
        "  noise_embeds_2/embedding: expected float32 [5, 48], found dtype 'object' [5, 48]",
        "  noise_embeds_3/embedding: expected float32 [5, 48], found bytes instead of an array",
        "  surplus/text: expected no such array, found str instead of an array",
        "  surplus/weight: expected no such array, found float32 [2]",
    ]
    assert not (tmp_path / "out").exists()


def test_an_error_leaves_the_old_model(tmp_path: Path) -> None:
    convert(LATENT, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="Embed_0/embedding: expected .* found none"):
        convert(changed_artifact(tmp_path / "source", {"Embed_0/embedding": None}), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_another_size_lists_every_array(tmp_path: Path) -> None:
    block = [name for name in flat(read_tree(LATENT)) if "/blocks_1/" in name]
    with pytest.raises(ValueError) as larger:
        convert(changed_artifact(tmp_path, {}, depth=3), tmp_path / "out")
    with pytest.raises(ValueError) as smaller:
        convert(changed_artifact(tmp_path, {}, depth=1), tmp_path / "out")
    for error in (larger, smaller):
        assert len(str(error.value).splitlines()) == 1 + len(block)
    for name in block:
        assert f"{name.replace('blocks_1', 'blocks_2')}: expected float32" in str(larger.value)
        assert f"{name}: expected no such array" in str(smaller.value)


def test_transposing_a_square_kernel_changes_the_samples(tmp_path: Path) -> None:
    """What no shape can tell is told by the golden samples."""
    convert(LATENT, tmp_path / "right")
    expected = samples_of(tmp_path / "right")
    square = [
        name for name in flat(read_tree(LATENT)) if name.endswith("kernel") and len(set(golden_array(name).shape)) == 1
    ]
    assert len(square) == 4
    for index, name in enumerate(square):
        source = changed_artifact(tmp_path / f"source_{index}", {name: golden_array(name).T})
        convert(source, tmp_path / f"wrong_{index}")
        error = (samples_of(tmp_path / f"wrong_{index}") - expected).abs().max() / expected.abs().max()
        assert error > 1e-4, name  # ten times what the golden test allows


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    gain = golden_array("RMSNorm_0/weight")
    upper = (gain.view(np.uint32) >> 16).astype(np.uint16)  # a bfloat16 is the upper half of a float32
    convert(
        changed_artifact(tmp_path / "source", {"RMSNorm_0/weight": packed([48], "bfloat16", upper.tobytes())}), tmp_path
    )
    weight = ImageGenerator.from_pretrained(tmp_path).conditioning.guidance.norm.weight
    assert weight.dtype == torch.float32
    assert np.array_equal(weight.detach().numpy().view(np.uint32), upper.astype(np.uint32) << 16)


def chunked(array: np.ndarray, *sizes: int, order: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    pieces = np.split(array.ravel(), np.cumsum(sizes))
    shape = {str(axis): size for axis, size in enumerate(array.shape)}
    chunks = {str(index): pieces[index] for index in order}
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_large_arrays_come_in_chunks(tmp_path: Path, order: tuple[int, ...]) -> None:
    name = "TimestepEmbedder_0/TorchLinear_0/Dense_0/kernel"
    tree = read_tree(LATENT)
    tree["TimestepEmbedder_0"]["TorchLinear_0"]["Dense_0"]["kernel"] = chunked(
        golden_array(name), 100, 5000, order=order
    )
    write_artifact(tmp_path, kind="gen", model_config=read_config(LATENT), tree=tree)
    assert np.array_equal(read_arrays(tmp_path / "ema_params.msgpack")[name], golden_array(name))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"shape": {"0": 4, "1": 4}}, "chunks of 12 numbers for [4, 4], which takes 16"),
        ({"shape": {"0": -3, "1": -4}}, "an array of shape [-3, -4]"),
        ({"shape": {"0": 3, "2": 4}}, "dict instead of a list in a chunked array"),
        ({"shape": 12}, "int instead of a list in a chunked array"),
        ({"chunks": {}}, "chunks of 0 numbers for [3, 4], which takes 12"),
        ({"chunks": {"0": "text"}}, "str instead of an array"),
        ({"more": 1}, "a chunked array with the keys ['__msgpack_chunked_array__', 'chunks', 'more', 'shape']"),
    ],
)
def test_damaged_chunks(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_artifact(tmp_path, kind="gen", model_config={}, tree={"kernel": chunked(array, 5, 5) | changes})
    assert read_arrays(tmp_path / "ema_params.msgpack") == {"kernel": Damaged(found)}


def test_a_root_named_params_is_left_out(tmp_path: Path) -> None:
    tree = {"params": read_tree(LATENT)}
    convert(write_artifact(tmp_path / "source", kind="gen", model_config=read_config(LATENT), tree=tree), tmp_path)
    convert(LATENT, tmp_path / "plain")
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()


def test_a_cut_or_lengthened_file(tmp_path: Path) -> None:
    content = (LATENT / "ema_params.msgpack").read_bytes()
    for cut in (0, 1, 2, 50, len(content) // 2, len(content) - 1):
        with pytest.raises(
            ValueError, match="expected a whole Flax msgpack file, found: Unpack failed: incomplete input"
        ):
            read_arrays(write_bytes(tmp_path, content[:cut]))
    with pytest.raises(ValueError, match="expected a whole Flax msgpack file, found: .*extra data"):
        read_arrays(write_bytes(tmp_path, content + b"\0"))


def test_a_name_counts_once(tmp_path: Path) -> None:
    one = msgpack.packb({"a": packed([1], "float32", bytes(4))})[1:]
    with pytest.raises(ValueError, match="the name 'a' twice in one map"):
        read_arrays(write_bytes(tmp_path, b"\x82" + one + one))
    leaf = packed([1], "float32", bytes(4))
    with pytest.raises(ValueError, match="expected each name once, found 'a/b' twice"):
        read_arrays(write_bytes(tmp_path, msgpack.packb({"a/b": leaf, "a": {"b": leaf}})))


@pytest.mark.parametrize(
    "content", [b"\xc0", b"\x01", b"\x90", b"\x81\x01\x80", b"\x81\xa1\n\x80", b"\xc1", b"\x81\xa1\xff\x80"]
)
def test_what_is_no_map_of_names(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="ema_params.msgpack: expected a whole Flax msgpack file, found: "):
        read_arrays(write_bytes(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 - 1 entries
        b"\xdf\x00\x01\x86\x9f" + bytes(9),
        b"\xdd\xff\xff\xff\xff",  # a list
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xdb\xff\xff\xff\xff",  # text
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
        b"\x81\xa1a" * 20 + b"\x80",
        b"\x81\xa1a" * 5000 + b"\x80",
        b"\x91" * 5000 + b"\xc0",
        b"\x81" * 5000 + b"\xc0",
    ],
    ids=["map", "short_map", "list", "bytes", "text", "extension", "depth_20", "depth_5000", "lists", "keys"],
)
def test_bombs_take_no_memory(tmp_path: Path, content: bytes) -> None:
    path = write_bytes(tmp_path, content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="expected a whole Flax msgpack file, found: "):
            read_arrays(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=300)
@given(content=st.binary(max_size=200))
def test_random_bytes_are_data_or_an_error(scratch: Path, content: bytes) -> None:
    assert_data_or_error(write_bytes(scratch, content))


@settings(max_examples=300)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), inserted=st.binary(max_size=3))
def test_a_changed_byte_is_data_or_an_error(scratch: Path, place: int, value: int, inserted: bytes) -> None:
    leaves = {"a/kernel": np.ones((2, 3), np.float32), "a/b/bias": np.zeros(2, np.float32), "c": chunked_tree()}
    content = bytearray(
        msgpack.packb(nested(leaves), default=lambda array: packed(array.shape, "float32", array.tobytes()))
    )
    place %= len(content)
    content[place : place + 1] = bytes([value]) + inserted
    assert_data_or_error(write_bytes(scratch, bytes(content)))


def chunked_tree() -> dict[str, Any]:
    return chunked(np.ones(6, np.float32), 2, 2)


def assert_data_or_error(path: Path) -> None:
    try:
        arrays = read_arrays(path)
    except ValueError as error:
        assert "ema_params.msgpack: expected " in str(error)
    else:
        assert all(isinstance(array, Damaged) or array.dtype == torch.float32 for array in arrays.values())


class MakesFolder:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    content = pickle.dumps(MakesFolder(str(tmp_path / "executed")))
    for leaf in (packed([1], "object", content), packed([1], "O", content), packed([len(content)], "|O", content)):
        with pytest.raises(ValueError, match="surplus: expected no such array, found dtype"):
            convert(changed_artifact(tmp_path / "source", {"surplus": leaf}), tmp_path / "out")
    with pytest.raises(ValueError, match="expected a whole Flax msgpack file"):
        read_arrays(write_bytes(tmp_path, content))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("", "metadata.json: "),
        ("[]", "expected an object with the keys 'kind' and 'model_config'"),
        ('{"kind": "gen"}', "expected an object with the keys 'kind' and 'model_config'"),
        ('{"kind": "vae", "model_config": {}}', "kind: expected 'gen' or 'mae', found 'vae'"),
        ('{"kind": "mae", "model_config": {"widths": 3}}', "model_config: expected the release's keys, found widths"),
        ('{"kind": "mae", "model_config": {}}', "model_config: layers: expected a list of an integer >= 1"),
        ('{"kind": "mae", "model_config": {"layers": [3, 4]}}', "layers: expected 4 numbers, found 2"),
        ('{"kind": "mae", "model_config": {"layers": [3, 4, 6, 1000000000]}}', r"layers\[3\]: expected an integer"),
        (
            '{"kind": "mae", "model_config": {"layers": [1, 1, 1, 1], "dropout_prob": 0.1}}',
            "dropout_prob: expected 0.0, the paper's, found 0.1",
        ),
    ],
)
def test_damaged_metadata(tmp_path: Path, metadata: str, message: str) -> None:
    (tmp_path / "metadata.json").write_text(metadata, encoding="utf-8")
    shutil.copy(LATENT / "ema_params.msgpack", tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rope": False}, "use_rope: expected True, the paper's, found False"),
        ({"out_channels": 8}, "out_channels: expected 4, the paper's, found 8"),
        ({"mlp_ratio": 2.0}, "mlp_ratio: expected 4.0, the paper's, found 2.0"),
        ({"depth": 10**9}, "depth: expected an integer >= 1 and <= 1000, found 1000000000"),
        ({"depth": "2"}, "depth: expected an integer"),
        ({"patch_size": 3}, "image_size: expected a multiple of patch_size 3, found 8"),
    ],
)
def test_a_generator_that_is_not_the_papers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"metadata.json: .*{message}"):
        convert(changed_artifact(tmp_path, {}, **changes), tmp_path / "out")


def test_defaults_are_the_releases(tmp_path: Path) -> None:
    """The published MAEs' metadata leaves out what their constructor has defaults for."""
    config = read_config(GOLDEN / "mae_latent")
    source = golden_mae("mae_latent", tmp_path)
    write_artifact(
        source, kind="mae", model_config={k: config[k] for k in config if k != "num_classes"}, tree=read_tree(source)
    )
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "out")
    assert str(error.value).splitlines()[1:] == [
        "  fc/bias: expected float32 [1000], found float32 [11]",
        "  fc/kernel: expected float32 [256, 1000], found float32 [256, 11]",
    ]


def test_errors_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for arguments, message in [
        (["source=latent_L", "out=x"], f", or one of {', '.join(RELEASED)}; found 'latent_L'"),
        ([f"source={tmp_path / 'empty'}", "out=x"], "found no metadata.json nor ema_params.msgpack"),
        (["source=ablation", "out=x"], "metadata.json and ema_params.msgpack of models/gen/jax/ablation elsewhere"),
        (["source=hf://mae_latent_640", "out=x"], "of models/mae/jax/mae_latent_640 elsewhere"),
        ([f"source={LATENT}", f"out={tmp_path / 'file'}"], "out: expected a folder that can be written, found"),
        (["out=x"], "source: expected text, found no value"),
    ]:  # fmt: skip
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not Path("x").exists()


def test_there_are_eight_names() -> None:
    assert sorted(RELEASED.values()) == ["gen"] * 5 + ["mae"] * 3
