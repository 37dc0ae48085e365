"""What compiled programs cost, against programs counted by hand: of this platform, and of TPUs by their text."""

import jax
import jax.numpy as jnp
import pytest

from rredcot_jax.cost import hlo
from rredcot_jax.parallel import sharding


def test_loops_count_as_often_as_they_run():
  def program(x, weights):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
    return jax.lax.fori_loop(0, 3, lambda _, x: x @ weights[0], x)

  shapes = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((7, 16, 16), jnp.float32)
  text = jax.jit(program).lower(*shapes).compile().as_text()
  assert hlo.count(text).flops == (7 + 3) * 2 * 8 * 16 * 16


def test_collectives_are_counted_by_what_a_device_sends():
  mesh = sharding.make_mesh(data=1, fsdp=4)
  whole = sharding.replicated(mesh)
  rows = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding.batch(mesh))
  gather = jax.jit(lambda x: x, out_shardings=whole).lower(rows).compile().as_text()
  assert hlo.count(gather).collective_bytes == {"all-gather": 3 * 2 * 16 * 4}
  total = jax.jit(lambda x: x.sum(axis=0), out_shardings=whole).lower(rows).compile().as_text()
  counted = hlo.count(total)
  assert counted.collective_bytes == {"all-reduce": 2 * 16 * 4 * 3 / 4}
  assert counted.collective_calls == {"all-reduce": 1}


TPU_TEXT = """
%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[128,128]{1,0} constant({...})
  %y = bf16[8,128]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %g = bf16[32,128]{1,0} all-gather(%y), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %t = (s32[], bf16[8,128]) tuple(%x, %y)
}

%condition (p.1: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(36)
  %p.1 = (s32[], bf16[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %a = (s32[], bf16[8,128]) parameter(0)
  ROOT %while = (s32[], bf16[8,128]) while(%a), condition=%condition, body=%body
}
"""


def test_a_tpus_text_has_convolutions_and_bounds_in_conditions():
  counted = hlo.count(TPU_TEXT)
  assert counted.flops == 36 * 2 * 8 * 128 * 128
  assert counted.collective_bytes == {"all-gather": 36 * 3 * 8 * 128 * 2}


@pytest.mark.parametrize(
  ("groups", "others"),
  [
    ("mesh['a'=2,'b'=4] {'b'}", 3),
    ("mesh['axis_0'=1,'axis_1'=16,'axis_2'=4], device_ids=([4,16]T(1,0)) {'axis_1'}", 15),
    ("[4,16]<=[64]", 15),
    ("[16,4]<=[4,16]T(1,0)", 3),
    ("{{0,1},{2,3}}", 1),
    ("{}", 63),  # All devices.
  ],
)
def test_groups_are_read_in_all_their_spellings(groups, others):
  text = "HloModule jit_f, num_partitions=64\n" + TPU_TEXT.replace("mesh['a'=2,'b'=4] {'b'}", groups)
  assert hlo.count(text).collective_bytes == {"all-gather": 36 * others * 8 * 128 * 2}


def test_a_collective_written_into_several_fusions_is_counted_once():
  gather = next(line for line in TPU_TEXT.splitlines() if "all-gather" in line)
  chained = gather + ', frontend_attributes={chain_id="13"}'
  steps = "\n".join(chained.replace("%g", f"%g{i}") for i in range(3))
  assert hlo.count(TPU_TEXT.replace(gather, steps)).collective_calls == {"all-gather": 36}
  assert hlo.count(TPU_TEXT.replace(gather, f"{gather}\n{gather}")).collective_calls == {"all-gather": 72}


def test_a_spelling_of_groups_that_is_not_known_is_not_guessed():
  with pytest.raises(ValueError, match="the groups of this collective are written in a way that is not known"):
    hlo.count(TPU_TEXT.replace("mesh['a'=2,'b'=4] {'b'}", "rings(2)"))


def entry(*instructions, header=""):
  """A module of one computation; the last instruction is its result."""
  *others, last = instructions
  return "\n".join([header, "ENTRY %main (a: f32[1]) -> f32[1] {", *(f"  {o}" for o in others), f"  ROOT {last}", "}"])


@pytest.mark.parametrize(
  ("instruction", "sent"),
  [
    # 8 x 16 float32 in groups of 4: a gather sends its part to three others, a scatter all parts but its own.
    ("all-gather(%x), replica_groups=[2,4]<=[8]", 3 * 512),
    ("reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%sum", 3 / 4 * 512),
    ("all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%sum", 2 * 3 / 4 * 512),
    ("all-to-all(%x), replica_groups=[2,4]<=[8]", 3 / 4 * 512),
    ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 512),
    # Of a pair of instructions only the first counts.
    ("all-gather-start(%x), replica_groups=[2,4]<=[8]", 3 * 512),
    ("all-gather-done(%x)", None),
  ],
)
def test_what_each_kind_of_collective_sends(instruction, sent):
  kind = instruction.partition("(")[0].removesuffix("-start")
  counted = hlo.count(entry("%x = f32[8,16] parameter(0)", f"%c = f32[8,16] {instruction}"))
  assert counted.collective_bytes == ({} if sent is None else {kind: sent})


@pytest.mark.parametrize(("kind", "size"), [("bf16", 2), ("f32", 4), ("s8", 1), ("f8e4m3fn", 1), ("s4", 0.5)])
def test_numbers_of_every_width_are_sent_at_their_width(kind, size):
  text = entry(f"%x = {kind}[8,16] parameter(0)", f"%c = {kind}[8,16] collective-permute(%x), source_target_pairs={{}}")
  assert hlo.count(text).collective_bytes == {"collective-permute": 128 * size}


@pytest.mark.parametrize(
  ("left", "kernel", "out", "window", "pairs"),
  [
    # Four windows over one place with padding on both sides: each sees it once, and the padding otherwise.
    (1, 4, 4, "size=4 pad=3_3", 4),
    # No padding: both windows see both places.
    (3, 2, 2, "size=2", 4),
    # Every second window.
    (5, 2, 2, "size=2 stride=2", 4),
    # Places spread out, zeros between them: windows of 2 over x 0 x 0 x see one place each.
    (3, 2, 4, "size=2 lhs_dilate=2", 4),
    # A kernel spread out over four places, of which padding covers the last.
    (3, 2, 1, "size=2 rhs_dilate=3 pad=0_1", 1),
  ],
)
def test_a_convolution_counts_the_places_its_windows_see(left, kernel, out, window, pairs):
  text = entry(
    f"%x = f32[{left},8,32] parameter(0)", f"%w = f32[{kernel},32,16] parameter(1)",
    f"%y = f32[{out},8,16] convolution(%x, %w), window={{{window}}}, dim_labels=0bf_0io->0bf",
  )  # fmt: skip
  assert hlo.count(text).flops == 2 * pairs * 8 * 32 * 16


@pytest.mark.parametrize(("name", "products"), [("splash_mha_fwd", 2), ("splash_mha_dq_", 3), ("splash_mha_dkv_", 4)])
def test_an_attention_kernel_counts_half_of_its_square(name, products):
  text = entry("%q = bf16[2,4,128,64] parameter(0)", f"%{name}.1 = bf16[2,4,128,64] custom-call(%q)")
  counted = hlo.count(text)
  assert counted.flops == counted.kernel_flops == products * 2 * (2 * 4) * 64 * 128 * 128 / 2
  assert hlo.count(text.replace("splash", "other")).flops == 0


def test_a_loop_of_known_length_and_one_unrolled_by_two():
  known = TPU_TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
  assert hlo.count(known).flops == 5 * 2 * 8 * 128 * 128
  # The counter that the condition reads grows by 2 each time.
  counter = "  %i.1 = s32[] get-tuple-element(%p), index=0\n  %two = s32[] constant(2)\n  %n = s32[] add(%i.1, %two)\n"
  unrolled = TPU_TEXT.replace("  ROOT %t =", counter + "  ROOT %t =").replace("tuple(%x, %y)", "tuple(%n, %y)")
  assert hlo.count(unrolled).flops == 36 / 2 * 2 * 8 * 128 * 128
  # A last turn that has one step left is a turn.
  assert hlo.count(unrolled.replace("constant(36)", "constant(35)")).flops == 18 * 2 * 8 * 128 * 128


def test_all_branches_of_a_conditional_count():
  branch = "%{} (a: f32[8,8]) -> f32[8,8] {{\n  %p{} = f32[8,8] parameter(0)\n  ROOT %d{} = f32[8,8] dot(%p{}, %p{}), "
  branch += "lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}\n}}\n"
  text = branch.format(*["b0"] * 5) + branch.format(*["b1"] * 5)
  text += entry("%x = f32[8,8] parameter(0)", "%c = f32[8,8] conditional(%x, %x), branch_computations={%b0, %b1}")
  assert hlo.count(text).flops == 2 * (2 * 8 * 8 * 8)


def test_memory_of_a_program_counts_what_is_given_over_once():
  x, y = jnp.zeros((256, 4)), jnp.zeros((256, 4))
  program = lambda x, y: (x + y, x.sum())
  kept = hlo.memory(jax.jit(program).lower(x, y).compile())
  given = hlo.memory(jax.jit(program, donate_argnums=0).lower(x, y).compile())
  assert kept["arguments"] == given["arguments"] == 2 * 4096
  assert kept["outputs"] - given["outputs"] == 4096 and 4 <= given["outputs"] < 64
  for found in (kept, given):
    assert found["peak"] >= found["arguments"] + found["outputs"] + found["temporaries"]


def test_floors_are_amounts_over_peaks():
  chip = hlo.Chip(hbm=1.0, flops=100.0, hbm_bandwidth=10.0, ici_bandwidth=4.0)
  counts = hlo.Counts(flops=300.0, collective_bytes={"all-gather": 6.0, "all-reduce": 2.0})
  assert hlo.floors(counts, 5.0, chip) == {"compute": 3.0, "memory": 0.5, "network": 2.0}
