"""Reading diffusers' config and weights: names, layouts, and every refusal."""

import json
import pathlib
import re

from flax import traverse_util
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffit_jax.autoencoder import AutoencoderKL, abstract_params
from diffit_jax.errors import UserError
from diffit_jax.interop import diffusers
from goldens import hfill

SD_CONFIG = {
  "_class_name": "AutoencoderKL",
  "_diffusers_version": "0.4.2",
  "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D"] * 4,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "out_channels": 3,
  "sample_size": 256,
  "up_block_types": ["UpDecoderBlock2D"] * 4,
}
WIDTHS = (4, 8)
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value"}


def expected_shapes(widths, layers, latent):
  """Every tensor of a diffusers file, as GOLDENS.md has them (VAE)."""
  shapes = {}

  def layer(name, *shape):
    shapes[f"{name}.weight"] = shape
    shapes[f"{name}.bias"] = shape[:1]

  def resnet(name, old, new):
    layer(f"{name}.norm1", old)
    layer(f"{name}.conv1", new, old, 3, 3)
    layer(f"{name}.norm2", new)
    layer(f"{name}.conv2", new, new, 3, 3)
    if old != new:
      layer(f"{name}.conv_shortcut", new, old, 1, 1)

  def mid(name, width):
    resnet(f"{name}.resnets.0", width, width)
    layer(f"{name}.attentions.0.group_norm", width)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
      layer(f"{name}.attentions.0.{part}", width, width)
    resnet(f"{name}.resnets.1", width, width)

  def levels(name, start, widths, blocks, resampler):
    width = start
    for i, new in enumerate(widths):
      for j in range(blocks):
        resnet(f"{name}.{i}.resnets.{j}", new if j else width, new)
      width = new
      if i < len(widths) - 1:
        layer(f"{name}.{i}.{resampler}.0.conv", new, new, 3, 3)

  top = widths[-1]
  layer("encoder.conv_in", widths[0], 3, 3, 3)
  levels("encoder.down_blocks", widths[0], widths, layers, "downsamplers")
  mid("encoder.mid_block", top)
  layer("encoder.conv_norm_out", top)
  layer("encoder.conv_out", 2 * latent, top, 3, 3)
  layer("quant_conv", 2 * latent, 2 * latent, 1, 1)
  layer("post_quant_conv", latent, latent, 1, 1)
  layer("decoder.conv_in", top, latent, 3, 3)
  mid("decoder.mid_block", top)
  levels("decoder.up_blocks", top, widths[::-1], layers + 1, "upsamplers")
  layer("decoder.conv_norm_out", widths[0])
  layer("decoder.conv_out", 3, widths[0], 3, 3)
  return shapes


def fill(shapes):
  """The goldens' tensors: hfill, and 1 + hfill for the norms' scales."""
  return {
    name: (
      hfill(name, shape, 0.2) + (len(shape) == 1 and name.endswith("weight"))
    ).astype(np.float32)
    for name, shape in shapes.items()
  }


def with_old_names(tensors, as_convolutions=False):
  """The file as it was before the attention's maps were renamed."""
  renamed = {}
  for name, array in tensors.items():
    old = re.sub(r"\.(to_[qkv])\.", lambda m: f".{OLD_NAMES[m[1]]}.", name)
    old = old.replace("to_out.0", "proj_attn")
    if old != name and as_convolutions and array.ndim == 2:
      array = array[:, :, None, None]
    renamed[old] = array
  return renamed


def module():
  return AutoencoderKL(
    block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=2
  )


def tensors():
  return fill(expected_shapes(WIDTHS, 1, 4))


def read(path, contents):
  save_file(contents, path)
  return diffusers.read_autoencoder_weights(path, abstract_params(module()))


def write_config(tmp_path, **changes):
  path = tmp_path / "config.json"
  path.write_text(json.dumps({**SD_CONFIG, **changes}))
  return path


def leaves(tree):
  return {
    diffusers.tensor_name(path): leaf
    for path, leaf in traverse_util.flatten_dict(tree).items()
  }


def test_layouts_are_transposed(tmp_path):
  contents = tensors()
  params = read(tmp_path / "w.safetensors", contents)
  encoder = params["encoder"]
  np.testing.assert_array_equal(
    encoder["conv_in"]["kernel"][0, 2, 1, 3],
    contents["encoder.conv_in.weight"][3, 1, 0, 2],
  )
  np.testing.assert_array_equal(
    encoder["mid_block"]["attentions_0"]["to_k"]["kernel"],
    contents["encoder.mid_block.attentions.0.to_k.weight"].T,
  )
  np.testing.assert_array_equal(
    params["decoder"]["up_blocks_0"]["resnets_1"]["norm2"]["scale"],
    contents["decoder.up_blocks.0.resnets.1.norm2.weight"],
  )


def test_names_and_shapes_of_the_sd_vae():
  shapes = expected_shapes((128, 256, 512, 512), 2, 4)
  assert len(shapes) == 248
  ours = leaves(abstract_params(AutoencoderKL()))
  assert {n: diffusers._file_shape(x.shape) for n, x in ours.items()} == shapes


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_attention_names_give_equal_parameters(tmp_path, as_convolutions):
  new = leaves(read(tmp_path / "new.safetensors", tensors()))
  contents = with_old_names(tensors(), as_convolutions)
  assert "decoder.mid_block.attentions.0.proj_attn.bias" in contents
  old = leaves(read(tmp_path / "old.safetensors", contents))
  assert old.keys() == new.keys()
  for name in new:
    np.testing.assert_array_equal(old[name], new[name])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_become_float32(tmp_path, dtype):
  half = {name: array.astype(dtype) for name, array in tensors().items()}
  ours = leaves(read(tmp_path / "w.safetensors", half))
  assert {leaf.dtype for leaf in ours.values()} == {np.dtype(np.float32)}
  np.testing.assert_array_equal(
    ours["quant_conv.bias"], half["quant_conv.bias"].astype(np.float32)
  )


def test_every_missing_extra_and_misshapen_tensor_is_listed(tmp_path):
  contents = tensors()
  del contents["quant_conv.bias"]
  del contents["encoder.mid_block.attentions.0.to_q.weight"]
  contents["decoder.up_blocks.7.odd"] = np.zeros(1, np.float32)
  contents["encoder.conv_in.weight"] = np.zeros((4, 5, 3, 3), np.float32)
  contents["decoder.conv_in.bias"] = np.zeros(8, np.int32)
  contents["decoder.mid_block.attentions.0.key.bias"] = np.zeros(8, np.float32)
  with pytest.raises(UserError) as error:
    read(tmp_path / "w.safetensors", contents)
  for text in (
    "w.safetensors does not fit its config.json",
    "missing encoder.mid_block.attentions.0.to_q.weight",
    "missing quant_conv.bias",
    "unknown decoder.up_blocks.7.odd",
    "encoder.conv_in.weight is (4, 5, 3, 3) instead of (4, 3, 3, 3)",
    "decoder.conv_in.bias is of type I32",
    "twice, as decoder.mid_block.attentions.0.key.bias and"
    " decoder.mid_block.attentions.0.to_k.bias",
  ):
    assert text in str(error.value)
  assert "\n" not in str(error.value)


def test_a_long_list_is_cut_and_counted(tmp_path):
  with pytest.raises(UserError, match=r"; and \d+ more$"):
    read(tmp_path / "w.safetensors", {"a": np.zeros(1, np.float32)})


def test_convolutions_are_not_squeezed_elsewhere(tmp_path):
  contents = tensors()
  contents["quant_conv.weight"] = contents["quant_conv.weight"][:, :, 0, 0]
  with pytest.raises(UserError, match=r"quant_conv.weight is \(8, 8\) instead"):
    read(tmp_path / "w.safetensors", contents)


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, keep):
  path = tmp_path / "w.safetensors"
  save_file(tensors(), path)
  whole = path.read_bytes()
  path.write_bytes(whole[: keep if keep > 1 else int(keep * len(whole))])
  with pytest.raises(UserError, match="not a whole safetensors file"):
    diffusers.read_autoencoder_weights(path, abstract_params(module()))


def test_sd_config_without_scaling_factor(tmp_path):
  sizes, scaling_factor = diffusers.read_autoencoder_config(
    write_config(tmp_path)
  )
  assert AutoencoderKL(**sizes) == AutoencoderKL()
  assert scaling_factor == 0.18215


def test_newer_config(tmp_path):
  path = write_config(
    tmp_path,
    scaling_factor=0.5,
    force_upcast=True,
    latents_mean=None,
    shift_factor=None,
    use_quant_conv=True,
    use_post_quant_conv=True,
    mid_block_add_attention=True,
    some_future_field=None,
  )
  assert diffusers.read_autoencoder_config(path)[1] == 0.5


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"act_fn": "relu"}, "act_fn='relu' is not supported, only 'silu'"),
    ({"_class_name": "VQModel"}, "_class_name='VQModel' is not supported"),
    ({"shift_factor": 0.1}, "shift_factor=0.1 is not supported"),
    ({"use_quant_conv": False}, "use_quant_conv=False is not supported"),
    ({"mid_block_add_attention": False}, "mid_block_add_attention=False"),
    ({"latents_mean": [0.0] * 4}, "latents_mean="),
    ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types=.*4 times"),
    ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types="),
    ({"norm_type": "spatial"}, "norm_type='spatial' is not a known field"),
    ({"latent_channels": 0}, "latent_channels=0 must be a positive whole"),
    ({"layers_per_block": "2"}, "layers_per_block='2' must be a positive"),
    ({"in_channels": True}, "in_channels=True must be a positive whole"),
    ({"block_out_channels": []}, r"block_out_channels=\[\] must be a list"),
    ({"block_out_channels": [128, 256.0]}, "block_out_channels=256.0"),
    ({"norm_num_groups": 48}, "norm_num_groups=48 must divide"),
    ({"scaling_factor": -1}, "scaling_factor=-1 must be a positive"),
    ({"scaling_factor": None}, "scaling_factor=None must be a positive"),
  ],
)
def test_other_networks_are_refused(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    diffusers.read_autoencoder_config(write_config(tmp_path, **changes))


@pytest.mark.parametrize(
  "text, message",
  [
    ("{", "not a readable JSON file"),
    ("[]", "not the config of an AutoencoderKL"),
    ("{}", "no block_out_channels"),
  ],
)
def test_files_that_are_no_config(tmp_path, text, message):
  path = tmp_path / "config.json"
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    diffusers.read_autoencoder_config(path)


def test_folders_without_the_files(tmp_path):
  with pytest.raises(UserError, match="nowhere is not a folder"):
    diffusers.find_files(tmp_path / "nowhere")
  with pytest.raises(UserError, match=r"config.json is not there \(found: not"):
    diffusers.find_files(tmp_path)
  write_config(tmp_path)
  with pytest.raises(UserError, match=r"model.safetensors is not there"):
    diffusers.find_files(tmp_path)


def test_a_whole_pipeline_points_to_its_vae(tmp_path):
  (tmp_path / "vae").mkdir()
  write_config(tmp_path / "vae")
  with pytest.raises(UserError, match=r"whole pipeline, give its VAE .*/vae"):
    diffusers.find_files(tmp_path)


def test_a_folder_with_half_precision_alone_is_read(tmp_path, caplog):
  """Whatever else lies there; and float32 wins where it is there."""
  write_config(tmp_path)
  stem = tmp_path / "diffusion_pytorch_model"
  half = {n: array.astype(np.float16) for n, array in tensors().items()}
  save_file(half, f"{stem}.fp16.safetensors")
  save_file({}, f"{stem}.non_ema.safetensors")
  pathlib.Path(f"{stem}.safetensors.index.json").write_text("{}")
  pathlib.Path(f"{stem}.bin").write_bytes(b"PK")
  with caplog.at_level("INFO"):
    _, weights = diffusers.find_files(tmp_path)
  assert "model.safetensors is not there: reading diffusion" in caplog.text
  assert weights.name == "diffusion_pytorch_model.fp16.safetensors"
  found = leaves(
    diffusers.read_autoencoder_weights(weights, abstract_params(module()))
  )
  for name, array in found.items():
    expected = half[name].astype(np.float32).reshape(
      diffusers._file_shape(array.shape)
    )
    axes = np.argsort(diffusers._file_axes(array.ndim))
    np.testing.assert_array_equal(array, expected.transpose(axes))
  save_file(tensors(), f"{stem}.safetensors")
  assert diffusers.find_files(tmp_path)[1].name == f"{stem.name}.safetensors"


@pytest.mark.parametrize("index", ["index", "index.fp16"])
def test_shards_are_refused_with_the_command_that_joins_them(tmp_path, index):
  write_config(tmp_path)
  stem = tmp_path / "diffusion_pytorch_model"
  pathlib.Path(f"{stem}.safetensors.{index}.json").write_text("{}")
  save_file(tensors(), f"{stem}-00001-of-00002.safetensors")
  with pytest.raises(UserError, match="save unsharded") as error:
    diffusers.find_files(tmp_path)
  assert "\n" not in str(error.value)
  code = re.search(r'python -c "(.*)" ', str(error.value))[1]
  compile(code, "<one-liner>", "exec")
  assert "max_shard_size" in code


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "vae.ckpt"])
def test_pickles_are_refused_with_the_conversion(tmp_path, name):
  write_config(tmp_path)
  (tmp_path / name).write_bytes(b"\x80\x04.")
  with pytest.raises(UserError, match=f"{name} is a pickle.*save_file") as e:
    diffusers.find_files(tmp_path)
  code = re.search(r'python -c "(.*)" ', str(e.value))[1]
  compile(code, "<one-liner>", "exec")
