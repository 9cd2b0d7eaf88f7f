"""Collectives of a small program, and the ring formula, by hand."""

import numpy as np
import pytest

from diffit_jax.planning import collectives, hlo

# An asynchronous all-gather stands in two fusions with one channel; the loop
# runs 28 times.
TEXT = """\
HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p.1: bf16[72,1152]) -> bf16[288,1152] {
  %p.1 = bf16[72,1152]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[288,1152]{1,0:T(8,128)(2,1)} all-gather(%p.1), \
channel_id=5, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, \
dimensions={0}, use_global_device_ids=true
}

%beside (p.2: bf16[72,1152]) -> bf16[288,1152] {
  %p.2 = bf16[72,1152]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[288,1152]{1,0:T(8,128)(2,1)} all-gather(%p.2), \
channel_id=5, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, \
dimensions={0}, use_global_device_ids=true
}

%condition (s: (s32[], bf16[72,1152])) -> pred[] {
  %s = (s32[], bf16[72,1152]) parameter(0)
  %limit = s32[] constant(28)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (s.1: (s32[], bf16[72,1152])) -> (s32[], bf16[72,1152]) {
  %s.1 = (s32[], bf16[72,1152]) parameter(0)
  %x = bf16[72,1152]{1,0} get-tuple-element(%s.1), index=1
  %f.1 = bf16[288,1152]{1,0} fusion(%x), kind=kCustom, calls=%start
  %f.2 = bf16[288,1152]{1,0} fusion(%x), kind=kCustom, calls=%beside
  ROOT %t = (s32[], bf16[72,1152]) tuple(%s.1, %x)
}

ENTRY %main (s.2: (s32[], bf16[72,1152]), g: f32[1000], h: f32[24]) -> f32[1] {
  %s.2 = (s32[], bf16[72,1152]) parameter(0)
  %g = f32[1000]{0} parameter(1)
  %h = f32[24]{0} parameter(2)
  %loop = (s32[], bf16[72,1152]) while(%s.2), condition=%condition, body=%body
  %ar = (f32[1000]{0}, f32[24]{0}) all-reduce-start(%g, %h), channel_id=9, \
replica_groups=[1,8]<=[8], to_apply=%add
  %done = (f32[1000]{0}, f32[24]{0}) all-reduce-done(%ar)
  %cp = f32[1000]{0} collective-permute(%g), channel_id=11, \
source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[1]{0} slice(%cp), slice={[0:1]}
}
"""


def test_each_channel_counts_once_for_each_run():
  found = collectives.find(hlo.parse(TEXT), num_chips=8)
  assert collectives.count(found) == {
    "all-gather": 28,
    "all-reduce": 1,
    "reduce-scatter": 0,
    "all-to-all": 0,
    "collective-permute": 1,
  }
  wire = {each.kind: each.wire_bytes for each in found}
  assert wire["all-gather"] == 28 * 3 * (2 * 72 * 1152)
  assert wire["all-reduce"] == 2 * 7 / 8 * 4 * 1024
  assert wire["collective-permute"] == 4000


def test_what_crosses_slices():
  found = collectives.find(hlo.parse(TEXT), num_chips=8, num_slices=2)
  slices = {each.kind: each.num_slices for each in found}
  assert slices == {"all-gather": 1, "all-reduce": 2, "collective-permute": 1}
  dcn = {each.kind: each.dcn_bytes for each in found}
  assert dcn["all-gather"] == 0
  # 4 chips of a slice reduce, and exchange a quarter each with 1 other slice.
  assert dcn["all-reduce"] == 2 * (1 / 2) * 4096 / 4
  wire = {each.kind: each.wire_bytes for each in found}
  assert wire["all-reduce"] == 2 * (3 / 4) * 4096


def test_what_libtpu_sends_between_slices():
  text = TEXT.replace(
    "  %cp =",
    "  %send = (f32[1000]{0}, u32[], token[]) send(%g, %a), channel_id=12,"
    " is_host_transfer=true, frontend_attributes={_xla_megascale_target="
    '"{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}\n  %cp =',
  )
  found = collectives.find(hlo.parse(text), num_chips=8, num_slices=2)
  assert collectives.count(found)["all-reduce"] == 2
  (sent,) = [c for c in found if c.num_slices == 2 and c.num_bytes == 4000]
  assert (sent.dcn_bytes, sent.wire_bytes) == (2 * (1 / 2) * 4000, 0)


@pytest.mark.parametrize(
  "kind, expected",
  [
    ("all-gather", 300),  # 3 other parts of 100
    ("reduce-scatter", 75),  # 3 of the 4 parts
    ("all-reduce", 150),  # both
    ("all-to-all", 75),
    ("collective-permute", 100),
  ],
)
def test_ring(kind, expected):
  assert collectives.ring_bytes(kind, 100, 4) == expected
  assert collectives.ring_bytes(kind, 100, 1) == 0


@pytest.mark.parametrize(
  "written, expected",
  [
    ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("{}", [[0, 1, 2, 3]]),
  ],
)
def test_groups(written, expected):
  text = TEXT.replace("[1,8]<=[8]", written)
  line = hlo.parse(text).computations["main"]["ar"]
  np.testing.assert_array_equal(collectives._groups(line, 4), expected)
