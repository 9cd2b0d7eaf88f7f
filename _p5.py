import sys, jax, jax.numpy as jnp, time
from benchmarks.train_worker import Network
from diffit_jax.parallel import sharding
from diffit_jax.training import program
def mem(tag, fields):
  n=Network(); info=n.load("imagenet256:precision=paper", {"batch_size":4,"model.depth":4}|fields)
  c=n.program.train_step.lower(n.program.abstract, jax.eval_shape(lambda: __import__('diffit_jax.training.state',fromlist=['x']).new_monitor(n.program.mesh)), n._batch()).compile()
  m=c.memory_analysis()
  t=c.as_text()
  print(tag, fields, 'params', info["parameters"]*4/2**30, 'kept', info["kept_bytes"]/2**30, 'args',m.argument_size_in_bytes/2**30,'temp',m.temp_size_in_bytes/2**30, 'out',m.output_size_in_bytes/2**30,'alias',m.alias_size_in_bytes/2**30, 'dus', t.count('dynamic-update-slice('), flush=True)
for r in ("none","dots","full"):
  mem("gather", {"model.remat":r})
mem("noscan", {"model.remat":"none","model.scan_blocks":False})
orig=sharding.gather
def make_loss(model, config, mesh):
  placed = model.clone(constrain=sharding.constrain_batch(mesh))
  from diffit_jax.training import objective
  return objective.adm_loss(placed, config.diffusion, config.autoencoder.scaling_factor)
program.make_loss=make_loss
for r in ("none","dots","full"):
  mem("plain", {"model.remat":r})
