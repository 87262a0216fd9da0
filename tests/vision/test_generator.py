"""The generator: its mathematics, its sizes, and the release's own samples."""

import errno
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.vision.release_artifacts import nchw
from vision.convert import convert
from vision.generator import PRESETS, ImageGenerator, sincos_positions
from vision.patches import patchify, unpatchify
from vision.transformer import Attention, RMSNorm, SwiGLU, rotary_table, rotate

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {
    "image_size": 8, "channels": 2, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "cond_size": 12,
    "num_classes": 5, "num_context_tokens": 3, "num_styles": 4, "num_style_entries": 6,
}  # fmt: skip


def make_generator(**changes: float) -> ImageGenerator:
    """A tiny generator whose every weight is random, so that nothing is hidden by the zeros of its start."""
    torch.manual_seed(0)
    generator = ImageGenerator(**TINY | changes)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return generator


def make_inputs(batch: int = 3) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    return {
        "noise": torch.randn(batch, 2, 8, 8, generator=source),
        "label": torch.randint(5, (batch,), generator=source),
        "guidance_scale": 1 + torch.rand(batch, generator=source),
        "style": torch.randint(6, (batch, 4), generator=source),
    }


def load_golden(name: str, folder: Path) -> tuple[ImageGenerator, dict[str, Tensor], Tensor]:
    convert(GOLDEN / name, folder)
    generator = ImageGenerator.from_pretrained(folder)
    with np.load(GOLDEN / name / "io.npz") as io:
        inputs = {
            "noise": nchw(io["noise_nhwc"]),
            "label": torch.from_numpy(io["class_labels"]),
            "guidance_scale": torch.from_numpy(io["cfg_scale"]),
            "style": torch.from_numpy(io["style_indices"]),
        }
        return generator, inputs, nchw(io["samples_nhwc"])


@pytest.mark.parametrize("name", ["generator_latent", "generator_pixel"])
def test_samples_are_the_releases(name: str, tmp_path: Path) -> None:
    generator, inputs, expected = load_golden(name, tmp_path)
    with torch.no_grad():
        samples = generator(**inputs)
    torch.testing.assert_close(samples, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("name", "millions"), [("B/2", 133), ("L/2", 463), ("B/16", 134), ("L/16", 464)])
def test_parameter_counts_of_the_paper(name: str, millions: int) -> None:
    with torch.device("meta"):
        generator = ImageGenerator(**PRESETS[name])
    assert round(sum(parameter.numel() for parameter in generator.parameters()) / 1e6) == millions


def test_presets_have_256_tokens_and_heads_of_64() -> None:
    for preset in PRESETS.values():
        assert (preset["image_size"] // preset["patch_size"]) ** 2 == 256
        assert preset["hidden_size"] // preset["num_heads"] == 64


def test_zero_output_at_the_start() -> None:
    torch.manual_seed(0)
    samples = ImageGenerator(**TINY)(**make_inputs())
    assert torch.equal(samples, torch.zeros(3, 2, 8, 8))


def test_blocks_are_the_identity_at_the_start() -> None:
    generator = ImageGenerator(**TINY)
    tokens = torch.randn(3, 19, 16)
    for block in generator.blocks:
        assert torch.equal(block(tokens, torch.randn(3, 12), generator.rotary), tokens)


def test_the_start_can_learn() -> None:
    """Zero output must not mean zero gradient: the last linear map moves first."""
    generator = ImageGenerator(**TINY)
    (generator(**make_inputs()) - 1).square().mean().backward()
    assert generator.final.out.weight.grad.abs().max() > 0


def test_initial_weights() -> None:
    torch.manual_seed(0)
    generator = ImageGenerator(**TINY | {"hidden_size": 64, "cond_size": 64, "num_classes": 500})
    block = generator.blocks[0]
    for layer in (block.attention.qkv, block.attention.out, block.feed_forward.down, generator.patch_embedding):
        bound = (6 / sum(layer.weight.shape)) ** 0.5  # Xavier: variance 2 / (in + out)
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    for half in block.feed_forward.gate_up.weight.chunk(2):
        bound = (6 / sum(half.shape)) ** 0.5
        assert 0.95 * bound < half.abs().max() <= bound
    for table in (generator.conditioning.label.weight, generator.conditioning.guidance.mlp[0].weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(generator.position, sincos_positions(4, 64))


def test_every_input_matters() -> None:
    generator, inputs = make_generator(), make_inputs()
    samples = generator(**inputs)
    changed = {
        "noise": inputs["noise"] + 1,
        "label": (inputs["label"] + 1) % 5,
        "guidance_scale": inputs["guidance_scale"] + 1,
        "style": (inputs["style"] + 1) % 6,
    }
    for name, value in changed.items():
        difference = (generator(**inputs | {name: value}) - samples).abs().amax(dim=(1, 2, 3))
        assert (difference > 1e-4).all(), name


def test_samples_do_not_see_each_other() -> None:
    generator, inputs = make_generator(), make_inputs(5)
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = generator(**{name: value[order] for name, value in inputs.items()})
    torch.testing.assert_close(permuted, generator(**inputs)[order], rtol=1e-5, atol=1e-5)
    alone = generator(**{name: value[2:3] for name, value in inputs.items()})
    torch.testing.assert_close(alone, generator(**inputs)[2:3], rtol=1e-5, atol=1e-5)


def test_style_is_a_sum_over_slots() -> None:
    embed = make_generator().conditioning.style
    style = make_inputs()["style"]
    table = embed.weight.reshape(6, 4, 12)  # [entry, slot, cond]
    expected = torch.stack([sum(table[row[slot], slot] for slot in range(4)) for row in style])
    torch.testing.assert_close(embed(style), expected)


@pytest.mark.parametrize(("gain", "options"), [(0.02, {}), (1.0, {"guidance_gain": 1.0})])
def test_guidance_embedding_formula(gain: float, options: dict[str, float]) -> None:
    embed = make_generator(**options).conditioning.guidance
    alpha = np.array([1.0, 2.5])
    angle = alpha[:, None] * 10000.0 ** (-np.arange(128) / 128)
    waves = torch.from_numpy(np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).float()
    hidden = embed.mlp(waves)
    expected = gain * embed.norm.weight * hidden / (hidden.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(embed(torch.from_numpy(alpha).float()), expected)


def test_no_styles() -> None:
    generator, inputs = make_generator(num_styles=0), make_inputs()
    assert generator.conditioning.style is None
    without = generator(inputs["noise"], inputs["label"], inputs["guidance_scale"])
    empty = generator(inputs["noise"], inputs["label"], inputs["guidance_scale"], inputs["style"][:, :0])
    assert torch.equal(without, empty)


def test_rotation_depends_on_relative_position_only() -> None:
    table = rotary_table(40, 8).double()
    query, key = torch.randn(2, 8, dtype=torch.float64)
    product = rotate(query.expand(40, 8), table) @ rotate(key.expand(40, 8), table).T  # [position, position]
    for offset in (-7, 0, 3):
        diagonal = product.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert product[0].std() > 1e-2  # and does depend on it


def test_rotation_keeps_lengths_and_the_first_token() -> None:
    x = torch.randn(40, 8)
    turned = rotate(x, rotary_table(40, 8))
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    assert torch.equal(turned[0], x[0])


def test_rotation_angles() -> None:
    """Channel i and channel i + D/2 of token n turn by n * 10000^(-2i/D)."""
    turned = rotate(torch.eye(4)[1].expand(6, 4), rotary_table(6, 4))
    angle = np.arange(6) * 10000.0 ** (-2 / 4)
    expected = np.stack([0 * angle, np.cos(angle), 0 * angle, np.sin(angle)], axis=1)
    torch.testing.assert_close(turned, torch.from_numpy(expected).float())


def test_rotation_in_bfloat16_is_the_releases() -> None:
    """The release's own table of 272 tokens and heads of 64, for the two latent finals."""
    generator = make_generator(hidden_size=128, image_size=32, num_context_tokens=16, rotary_in_bfloat16=True)
    with np.load(GOLDEN / "rotary_bfloat16.npz") as golden:
        expected = np.stack([golden["cosine"], golden["sine"]])  # [2, N, D/2]
    assert generator.rotary.shape == expected.shape
    assert (generator.rotary.numpy() != expected).mean() < 1e-3  # a cosine may fall between two bfloat16 numbers
    torch.testing.assert_close(generator.rotary, torch.from_numpy(expected), rtol=0, atol=2**-8)
    assert (rotary_table(272, 64) - generator.rotary).abs().max() > 0.9  # late tokens are turned elsewhere
    assert not any("rotary" in name for name in generator.state_dict())


def test_attention_against_a_loop() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    table = rotary_table(5, 4)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    qkv = attention.qkv(x)[0]  # [N, 24]: queries, keys, values; each head by head
    heads = []
    for head in range(2):
        query, key, value = (qkv[:, 8 * part + 4 * head : 8 * part + 4 * head + 4] for part in range(3))
        query, key = rotate(attention.query_norm(query), table), rotate(attention.key_norm(key), table)
        weight = (query @ key.T / 4**0.5).exp()
        heads.append(weight / weight.sum(dim=1, keepdim=True) @ value)
    expected = attention.out(torch.cat(heads, dim=1))
    torch.testing.assert_close(attention(x, table)[0], expected, rtol=1e-4, atol=1e-4)


def test_swiglu_formula_and_width() -> None:
    layer = SwiGLU(48)
    x = torch.randn(7, 48)
    gate_weight, up_weight = layer.gate_up.weight.chunk(2)
    gate = x @ gate_weight.T
    expected = (gate * gate.sigmoid() * (x @ up_weight.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected)
    assert [SwiGLU(size).down.in_features for size in (48, 768, 1024)] == [128, 2048, 2752]


def test_rms_norm_formula() -> None:
    norm = RMSNorm(6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 6)
    expected = norm.weight * x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_positions_say_column_then_row() -> None:
    table = sincos_positions(5, 16).reshape(5, 5, 16)  # [row, column, channel]
    assert torch.equal(table[0, :, :8], table[3, :, :8])  # first half: the same in every row
    assert torch.equal(table[:, 0, 8:], table[:, 3, 8:])  # second half: the same in every column
    frequency = 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.sin(3 * frequency), np.cos(3 * frequency)])
    np.testing.assert_allclose(table[1, 3, :8], expected, rtol=1e-6)
    np.testing.assert_allclose(table[3, 1, 8:], expected, rtol=1e-6)


def test_patchify_order() -> None:
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    corner = images[1, :, 4:8, 8:12]  # patch in row 1, column 2
    assert torch.equal(patches[1, 5], corner.permute(1, 2, 0).flatten())


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_unpatchify_undoes_patchify(patch_size: int) -> None:
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(unpatchify(patchify(images, patch_size), patch_size), images)


def test_save_and_load(tmp_path: Path) -> None:
    generator, inputs = make_generator(), make_inputs()
    generator.save_pretrained(tmp_path / "model")
    loaded = ImageGenerator.from_pretrained(tmp_path / "model")
    assert loaded.config == generator.config
    assert loaded.state_dict().keys() == generator.state_dict().keys()
    assert torch.equal(loaded(**inputs), generator(**inputs))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_saved_files_can_be_read_by_others(tmp_path: Path) -> None:
    make_generator().save_pretrained(tmp_path)
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_a_full_disk_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make_generator()
    generator.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fill_the_disk(path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    torch.nn.init.zeros_(generator.position)
    with pytest.raises(OSError, match="No space left on device"):
        generator.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_config_holds_every_keyword() -> None:
    keywords = inspect.signature(ImageGenerator).parameters
    assert make_generator().config.keys() == keywords.keys()


def test_loading_is_strict(tmp_path: Path) -> None:
    make_generator().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    for old, new, error, message in [
        ('"depth": 2', '"depth": 3', ValueError, "blocks.2.modulation.weight"),
        ('"depth": 2', '"depth": 1', ValueError, "blocks.1.modulation.weight"),
        ('"cond_size": 12', '"cond_size": 13', ValueError, "conditioning.label.weight"),
        ('"depth"', '"depht"', ValueError, "config.json: .*unexpected keyword argument 'depht'"),
        ('"depth": 2', '"depth": 0', ValueError, "config.json: depth: expected at least 1, found 0"),
        ('"depth": 2', '"depth": 2, "depth": 2', ValueError, "config.json: JSON key given twice: 'depth'"),
        ('"arguments": {', '"arguments": 7, "rest": {', ValueError, "keys 'model' and 'arguments'"),
        (
            "ImageGenerator",
            "ResNetMAE",
            ValueError,
            "config.json: expected the config of ImageGenerator, found",
        ),
        ("{", "", ValueError, "config.json: "),
        ('"model"', '"modle"', ValueError, "keys 'model' and 'arguments'"),
    ]:
        (tmp_path / "config.json").write_text(config.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(error, match=message):
            ImageGenerator.from_pretrained(tmp_path)


def test_loading_a_cut_or_absent_file(tmp_path: Path) -> None:
    make_generator().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        ImageGenerator.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        ImageGenerator.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        ImageGenerator.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("noise", torch.zeros(3, 2, 8, 9), ValueError, r"noise: expected shape \[3, 2, 8, 8\], found \[3, 2, 8, 9\]"),
        ("noise", torch.zeros(3, 2, 8, 8).long(), TypeError, "noise: expected real numbers, found torch.int64"),
        ("label", torch.zeros(2).long(), ValueError, r"label: expected shape \[3\], found \[2\]"),
        ("label", torch.zeros(3), TypeError, "label: expected integers, found torch.float32"),
        ("label", torch.tensor([0, 5, 1]), ValueError, r"label: expected values in \[0, 5\), found 0 to 5"),
        ("label", torch.tensor([0, -1, 1]), ValueError, r"label: expected values in \[0, 5\), found -1 to 1"),
        ("guidance_scale", torch.ones(3, 1), ValueError, r"guidance_scale: expected shape \[3\], found \[3, 1\]"),
        ("style", torch.zeros(3, 5).long(), ValueError, r"style: expected shape \[3, 4\], found \[3, 5\]"),
        ("style", torch.full((3, 4), 6), ValueError, r"style: expected values in \[0, 6\), found 6 to 6"),
        ("style", None, ValueError, r"style: expected shape \[3, 4\], found \[3, 0\]"),
    ],
)
def test_wrong_inputs(name: str, value: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_generator()(**make_inputs() | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth: expected at least 1, found 0"),
        ({"num_styles": -1}, "num_styles: expected at least 0, found -1"),
        ({"image_size": 9}, "image_size: expected a multiple of patch_size 2, found 9"),
        ({"hidden_size": 18}, "hidden_size: expected a multiple of 4"),
        ({"num_heads": 3}, "hidden_size: expected a multiple of 4 and of 2 [*] num_heads = 6"),
    ],
)
def test_wrong_sizes(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageGenerator(**TINY | changes)


@pytest.mark.parametrize("attention_in_float32", [True, False])
def test_bfloat16_autocast(attention_in_float32: bool) -> None:
    """Activations in bfloat16 give the float32 samples to bfloat16's own precision; weights and adaLN stay float32."""
    generator, inputs = make_generator(attention_in_float32=attention_in_float32), make_inputs()
    dtypes: list[torch.dtype] = []
    generator.blocks[0].modulation.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    generator.blocks[0].register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    expected = generator(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        samples = generator(**inputs)
    samples.float().square().mean().backward()
    assert dtypes == [torch.float32, torch.float32, torch.float32, torch.bfloat16]
    assert {parameter.grad.dtype for parameter in generator.parameters()} == {torch.float32}
    error = (samples.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(autocast: bool) -> None:
    generator, inputs = make_generator(depth=1), make_inputs()
    compiled = torch.compile(generator, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        samples, expected = compiled(**inputs), generator(**inputs)
    torch.testing.assert_close(samples, expected)
    samples.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in generator.parameters())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_kernels_give_the_same_samples() -> None:
    generator, inputs = make_generator(depth=1), make_inputs()
    with torch.no_grad():
        samples = torch.compile(generator, fullgraph=True)(**inputs)
        torch.testing.assert_close(samples, generator(**inputs), rtol=1e-4, atol=1e-4)
