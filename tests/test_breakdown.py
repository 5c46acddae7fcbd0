"""Which operations touch how many bytes, from a compiled program's text."""

import pytest

from ktda_jax.plan import breakdown

TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/x/ktda_jax/training/program.py"
2 "/home/x/ktda_jax/models/fmm.py"
3 "/usr/lib/jax/numpy.py"

FunctionNames
1 "train_step"
2 "FMM.__call__"
3 "add"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
2 {file_name_id=2 function_name_id=2 line=2 end_line=2 column=1 end_column=1}
3 {file_name_id=3 function_name_id=3 line=3 end_line=3 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%fused.1 (p.0: bf16[1000,500], p.1: bf16[500,500]) -> bf16[1000,500] {
  %p.0 = bf16[1000,500]{1,0} parameter(0)
  %p.1 = bf16[500,500]{1,0} parameter(1)
  ROOT %c.1 = bf16[1000,500]{1,0} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%body.1 (arg: (f32[1000])) -> (f32[1000]) {
  %arg = (f32[1000]{0}) parameter(0)
  %g.1 = f32[1000]{0} get-tuple-element(%arg), index=0
  ROOT %s.1 = f32[1000]{0} add(%g.1, %g.1), metadata={op_name="jit(step)/while" stack_frame_id=1}
}

ENTRY %main (a: bf16[1000,500], b: bf16[500,500]) -> bf16[1000,500] {
  %a = bf16[1000,500]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[500,500]{1,0} parameter(1)
  %start = (bf16[500,500]{1,0}, bf16[500,500]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%b)
  %done = bf16[500,500]{1,0:S(1)} copy-done(%start)
  %f.1 = bf16[1000,500]{1,0} fusion(%a, %done), kind=kOutput, calls=%fused.1, metadata={op_name="jit(step)/transpose(jvp())/dot" stack_frame_id=3}
  %w.1 = (f32[1000]{0}) while(%t), condition=%cond, body=%body.1
  ROOT %n.1 = bf16[1000,500]{1,0} negate(%f.1), metadata={op_name="jit(step)/neg" stack_frame_id=2}
}
"""  # noqa: E501


def test_kinds_and_places():
    megabyte = 1e-3  # in GB
    found = breakdown.touched(TEXT)
    assert found == pytest.approx({
        ("product", "fmm.FMM.__call__ backward"): 2 * megabyte,  # its second operand lies in the chip's own memory
        ("elementwise", "fmm.FMM.__call__"): 2 * megabyte,
        ("copy", "elsewhere"): 0.5 * megabyte,
        ("elementwise", "elsewhere"): 3 * 4e-6,  # in the loop
    })  # fmt: skip
    assert list(found.values()) == sorted(found.values(), reverse=True)
    lines = breakdown.table({k: 1e3 * v for k, v in found.items()}, rows=2).splitlines()
    assert lines[0] == "GB that leave or enter a chip's memory: elementwise 2.0, product 2.0, copy 0.5"
    assert lines[1:] == ["    2.00  product     fmm.FMM.__call__ backward", "    2.00  elementwise fmm.FMM.__call__"]
