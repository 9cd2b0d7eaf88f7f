"""Bytes of a small program, by hand."""

from diffit_jax.planning import hlo, traffic

# 5 runs of: a fused slice of a stack in HBM, whose sum goes back into the stack
# in place; and a product of it with weights that were copied to the chip.
TEXT = """\
HloModule jit_step

%take (p.0: f32[5,100], p.1: s32[]) -> f32[1,100] {
  %p.0 = f32[5,100]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %ds = f32[1,100]{1,0} dynamic-slice(%p.0, %p.1), sizes={1,100}
}

%put (q.0: f32[5,100], q.1: f32[1,100], q.2: s32[]) -> f32[5,100] {
  %q.0 = f32[5,100]{1,0} parameter(0)
  %q.1 = f32[1,100]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  ROOT %dus = f32[5,100]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2)
}

%condition (c: (s32[], f32[5,100], f32[100])) -> pred[] {
  %c = (s32[], f32[5,100], f32[100]) parameter(0)
  %limit = s32[] constant(5)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%j, %limit), direction=LT
}

%body (s: (s32[], f32[5,100], f32[100])) -> (s32[], f32[5,100], f32[100]) {
  %s = (s32[], f32[5,100], f32[100]) parameter(0)
  %i = s32[]{:S(2)} get-tuple-element(%s), index=0
  %stack = f32[5,100]{1,0} get-tuple-element(%s), index=1
  %w = f32[100]{0} get-tuple-element(%s), index=2
  %x = f32[1,100]{1,0:S(1)} fusion(%stack, %i), kind=kLoop, calls=%take
  %cs = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%w)
  %cd = f32[100]{0:S(1)} copy-done(%cs)
  %y = f32[1,100]{1,0:S(1)} multiply(%x, %cd)
  %new = f32[5,100]{1,0} fusion(%stack, %y, %i), kind=kLoop, calls=%put
  ROOT %t = (s32[], f32[5,100], f32[100]) tuple(%i, %new, %w)
}

ENTRY %main (a: (s32[], f32[5,100], f32[100])) -> f32[5,100] {
  %a = (s32[], f32[5,100], f32[100]) parameter(0)
  %loop = (s32[], f32[5,100], f32[100]) while(%a), condition=%condition, \
body=%body
  ROOT %out = f32[5,100]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_slices_updates_and_memory_spaces():
  found = traffic.measure(hlo.parse(TEXT))
  row, index = 400, 4
  hbm = row + row + row  # read the slice, read the weights, write the update
  assert found.hbm == 5 * hbm
  touched = (row + row + index) + 2 * row + 3 * row + (row + row + index)
  assert found.touched == 5 * touched
  assert found.tiled == found.hbm  # the text has no tiles


KERNEL = """\
HloModule jit_kernel

ENTRY %main (a: bf16[3,100,72], d: f32[32]) -> bf16[3,100,72] {
  %a = bf16[3,100,72]{2,1,0:T(8,128)(2,1)} parameter(0)
  %d = f32[32]{0:T(128)S(1)} parameter(1)
  %b = bf16[3,100,72]{1,2,0:T(8,128)(2,1)} copy(%a)
  ROOT %k = bf16[3,100,72]{2,1,0:T(8,128)(2,1)} custom-call(%b, %d), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"body":"TUz","cost_estimate":{"flops":"8","bytes_accessed":"MOVED"}}}
}
"""


def test_a_kernel_reads_again_what_it_says():
  array, vector = 2 * 3 * 100 * 72, 4 * 32
  once = 2 * array + vector
  measure = lambda moved: traffic.measure(
    hlo.parse(KERNEL.replace("MOVED", str(moved)))
  )
  found = measure(once + 1000)
  assert found.touched == 2 * array + once + 1000
  assert found.hbm == 4 * array + 1000
  # Of the last two dimensions in their order, the first is made a multiple of
  # 8, the last one of 128.
  rows, columns = 2 * 3 * 104 * 128, 2 * 3 * 128 * 72
  assert found.tiled == (rows + columns) + (columns + rows) + 1000
  assert measure(once - 1000).hbm == 4 * array  # it cannot read less
