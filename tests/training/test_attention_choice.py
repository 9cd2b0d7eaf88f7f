"""What `auto` stands for: the kernel of the devices, probed and kept."""

from etils import epath
import pytest

from configs import digits
from diffit_jax.errors import UserError
from diffit_jax.generation import generator
from diffit_jax.models import kernels
from diffit_jax.models.kernels import plain
from diffit_jax.parallel.mesh import make_mesh
from diffit_jax.training import attention_choice as choice


def right(q, k, v, bias):
  return plain.attend(q, k, v, bias)


def wrong(q, k, v, bias):
  return plain.attend(q, k, v, -bias)


def add_kernel(monkeypatch, attend, name="made_up"):
  row = kernels.Kernel(plain.by_heads(attend), "float32", "cpu", "a CPU")
  monkeypatch.setitem(kernels.KERNELS, name, row)


@pytest.fixture
def config():
  config = digits.get_config("debug")
  config.model.attention = "auto"
  config.model.channel_mult = (1,)  # one kind of attention to probe
  return config


def take(config, folder) -> str:
  """The kernel that one start takes, and keeps."""
  built = choice.build(config, None, folder)
  choice.keep(config, built, folder)
  return built.model.attention


def test_auto_is_plain_where_no_kernel_serves(config, tmp_path, monkeypatch):
  said = []
  log = lambda text, *args: said.append(text % args)
  monkeypatch.setattr(choice.logging, "info", log)
  assert take(config, epath.Path(tmp_path)) == "xla"
  assert said == [
    "model.attention=auto is xla on cpu: model.attention='pallas' needs a TPU"
    " newer than TPU v4, not cpu; model.attention='cudnn' needs an NVIDIA GPU,"
    " not cpu"
  ]
  (file,) = tmp_path.iterdir()
  assert '"attention": "xla"' in file.read_text()


def test_a_run_keeps_its_kernel(config, tmp_path, monkeypatch):
  folder = epath.Path(tmp_path)
  add_kernel(monkeypatch, right)
  assert take(config, folder) == "made_up"
  monkeypatch.delitem(kernels.KERNELS, "made_up")
  add_kernel(monkeypatch, right, "faster")  # of a later version
  add_kernel(monkeypatch, right)
  assert take(config, folder) == "made_up"
  text = (folder / choice.FILE).read_text()
  (folder / choice.FILE).write_text(text.replace('"cpu"', '"TPU v4"'))
  assert take(config, folder) == "faster"  # of other devices, chosen anew
  config.model.attention = "xla"
  assert choice.build(config, None, folder).model.attention == "xla"


def test_a_wrong_kernel_is_left_where_it_was_not_asked_for(
  config, tmp_path, monkeypatch
):
  folder = epath.Path(tmp_path)
  add_kernel(monkeypatch, wrong)
  said = []
  warn = lambda *args: said.append(args)
  monkeypatch.setattr(choice.logging, "warning", warn)
  assert take(config, folder) == "xla"
  assert "gives a wrong output here" in str(said)
  config.model.attention = "made_up"
  with pytest.raises(UserError, match="'made_up' gives a wrong output here"):
    take(config, folder)


def test_a_kept_kernel_that_fails_now_ends_the_run(
  config, tmp_path, monkeypatch
):
  folder = epath.Path(tmp_path)
  add_kernel(monkeypatch, right)
  assert take(config, folder) == "made_up"
  add_kernel(monkeypatch, wrong)
  with pytest.raises(UserError, match="begun with attention made_up, .*=xla"):
    take(config, folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"attention": "unknown"}'])
def test_a_damaged_note_is_passed_over(config, tmp_path, content):
  folder = epath.Path(tmp_path)
  (folder / choice.FILE).write_text(content)
  assert take(config, folder) == "xla"


def test_sampling_takes_a_kernel_that_passes_the_probe(config, monkeypatch):
  side, mesh = config.data.resolution, make_mesh()
  taken = lambda model: generator._with_kernel(model, side, mesh).attention
  model = generator.make_model(config)
  assert taken(model) == "xla"
  add_kernel(monkeypatch, right)
  assert taken(model) == "made_up"
  add_kernel(monkeypatch, wrong)
  assert taken(model) == "xla"
  # That of a training run, which has probed it, for the run's own grids.
  assert taken(model.clone(attention="made_up")) == "made_up"
