"""The reader of HLO text, on programs small enough to count by hand."""

from diffit_jax.planning import hlo

# A loop of 3 around a loop of 28, each with a fusion, then one of unknown
# length; types, comments, layouts and names as libtpu writes them.
TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%fused.1 (p.1: bf16[16,72]) -> f32[16,72] {
  %p.1 = bf16[16,72]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %convert.1 = f32[16,72]{1,0:T(8,128)} convert(%p.1)
}

%inner.condition (p.2: (s32[], f32[2])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(28)
  %p.2 = (s32[]{:T(128)}, f32[2]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %limit.1), direction=LT
}

%inner.body (p.3: (s32[], f32[2])) -> (s32[], f32[2]) {
  %p.3 = (s32[]{:T(128)}, f32[2]{0:T(128)}) parameter(0)
  %x.1 = f32[16,72]{1,0:T(8,128)} fusion(%p.3), kind=kLoop, calls=%fused.1
  ROOT %t.1 = (s32[]{:T(128)}, /*index=1*/f32[2]{0:T(128)S(1)}) tuple(%p.3)
}

%outer.condition (p.4: s32[]) -> pred[] {
  %p.4 = s32[] parameter(0)
  ROOT %lt.2 = pred[] custom-call(%p.4), custom_call_target="Unknown"
}

%outer.body (p.5: s32[]) -> s32[] {
  %p.5 = s32[] parameter(0)
  %w.1 = (s32[], f32[2]) while(%p.5), condition=%inner.condition, \
body=%inner.body
  ROOT %g.1 = s32[] get-tuple-element(%w.1), index=0
}

ENTRY %main.1 (a.1: s32[]) -> s32[] {
  %a.1 = s32[] parameter(0), metadata={op_name="a = (b"}
  %w.2 = s32[] while(%a.1), condition=%outer.condition, body=%outer.body, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %w.3 = s32[] while(%w.2), condition=%outer.condition, body=%outer.body
}
"""


def test_instructions_and_their_parts():
  module = hlo.parse(TEXT)
  assert module.entry == "main.1"
  fused = module.computations["fused.1"]
  assert fused["convert.1"].is_root and fused["convert.1"].operands == ("p.1",)
  (array,) = fused["p.1"].arrays
  assert (array.dtype, array.shape, array.space) == ("bf16", (16, 72), 1)
  assert array.num_bytes == 2 * 16 * 72
  root = module.computations["inner.body"]["t.1"]
  assert [a.shape for a in root.arrays] == [(), (2,)]
  assert [a.space for a in root.arrays] == [0, 1]


def test_sizes_of_types():
  types = "(f32[3], pred[3], s4[3], f8e4m3fn[3], c64[3], token[], u32[])"
  sizes = [array.num_bytes for array in hlo.parse_arrays(types)]
  assert sizes == [12, 3, 2, 3, 24, 0, 4]


def test_runs_multiply_through_loops():
  runs, num_unknown = hlo.count_runs(hlo.parse(TEXT))
  assert num_unknown == 1  # w.3, which counts as one run
  assert runs["outer.body"] == 3 + 1
  assert runs["inner.body"] == (3 + 1) * 28
  assert runs["fused.1"] == (3 + 1) * 28
  assert runs["inner.condition"] == 0
