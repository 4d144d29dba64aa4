"""What the text of a compiled program says: exchanges, arrays that are written, memory."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.hlo import (
    bytes_moved,
    collectives,
    describe_program,
    largest_arrays,
    largest_exchanges,
    parse_program,
)

# A loop that runs six times, exchanges in one part and in two, of a device with itself, and padded arrays.
TEXT = textwrap.dedent(
    """
    HloModule jit_step, is_scheduled=true

    %add (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %sum = f32[] add(%a, %b)
    }

    %fused (p: f32[4,4]) -> f32[4,4] {
      %p = f32[4,4]{1,0} parameter(0)
      ROOT %big = f32[4000,4000]{1,0} broadcast(%p), dimensions={0,1}
    }

    %body (state: (s32[], f32[8,3])) -> (s32[], f32[8,3]) {
      %state = (s32[], f32[8,3]{1,0}) parameter(0)
      %x = f32[8,3]{1,0:T(8,128)} get-tuple-element(%state), index=1
      %halo = f32[8,3]{1,0:T(8,128)} collective-permute(%x), source_target_pairs={{0,1}}, metadata={op_name="halo"}
      ROOT %next = (s32[], f32[8,3]{1,0}) tuple(%i, %halo)
    }

    %condition (state.1: (s32[], f32[8,3])) -> pred[] {
      %state.1 = (s32[], f32[8,3]{1,0}) parameter(0)
      ROOT %less = pred[] compare(%i, %n), direction=LT
    }

    ENTRY %main (w: f32[5], x.1: bf16[8,16]) -> (f32[5], bf16[2,16]) {
      %w = f32[5]{0} parameter(0)
      %x.1 = bf16[8,16]{1,0} parameter(1)
      %alone = f32[5]{0} all-reduce(%w), replica_groups={{0},{1}}, to_apply=%add
      %alone.1 = f32[5]{0} all-reduce(%w), replica_groups=[8,1]<=[8], to_apply=%add
      %start = (f32[5]{0}, /*index=1*/f32[7]{0}) all-reduce-start(%w, %v), replica_groups={{0,1}}, to_apply=%add
      %done = (f32[5]{0}, f32[7]{0}) all-reduce-done(%start)
      %scattered = bf16[2,16]{1,0} reduce-scatter(%x.1), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
      %loop = (s32[], f32[8,3]{1,0}) while(%t), condition=%condition, body=%body, backend_config={TRIPS}
      %on_chip = f32[4096]{0:T(1024)S(1)} fusion(%w), kind=kLoop, calls=%fused
      %wide = f32[2,4096,3]{1,2,0:T(4,128)} fusion(%w), calls=%fused, metadata={op_name="jit(step)/wide"}
      ROOT %out = (f32[5]{0}, bf16[2,16]{1,0}) tuple(%alone, %scattered)
    }
    """
).replace("TRIPS", '"known_trip_count":{"n":"6"}')


def test_each_array_that_is_taken_or_given_counts() -> None:
    assert bytes_moved(parse_program(TEXT)) is None
    without_loop = TEXT.replace("while(%t)", "fusion(%t)")
    exchanged = 2 * (20 + 20) + (20 + 28) + (256 + 64)
    loop = 4 + 4 * 8 * 3
    fusions = (20 + 4 * 4096) + (20 + 4 * 2 * 4096 * 3)
    assert bytes_moved(parse_program(without_loop)) == exchanged + loop + fusions


def test_exchanges_count_once_and_as_often_as_their_loop_runs() -> None:
    assert collectives(parse_program(TEXT)) == {
        "all-reduce": {"count": 1, "bytes": 4 * 12},
        "reduce-scatter": {"count": 1, "bytes": 2 * 8 * 16},
        "collective-permute": {"count": 6, "bytes": 6 * 4 * 8 * 3},
    }


def test_exchanges_of_most_bytes_come_first() -> None:
    first, second, *_ = largest_exchanges(parse_program(TEXT))
    assert first == {"kind": "collective-permute", "count": 6, "bytes": 6 * 4 * 8 * 3, "written_by": "halo"}
    assert (second["kind"], second["written_by"]) == ("reduce-scatter", "scattered")


def test_largest_arrays_are_those_in_memory_with_their_padding() -> None:
    wide, halo, *_ = largest_arrays(parse_program(TEXT))
    assert wide == {
        "shape": "f32[2,4096,3]",
        "bytes": 4 * 2 * 4 * 4096,
        "count": 1,
        "written_by": ["jit(step)/wide"],
    }
    assert halo == {"shape": "f32[8,3]", "bytes": 4 * 8 * 128, "count": 1, "written_by": ["halo"]}


def test_a_compiled_program() -> None:
    mesh = Mesh(jax.devices()[:4], ("x",))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("x")))

    def program(x: jax.Array) -> jax.Array:
        def shift(i: int, x: jax.Array) -> jax.Array:
            return jax.lax.ppermute(x, "x", [(0, 1), (1, 2)])

        def local(x: jax.Array) -> jax.Array:
            return jax.lax.psum(jax.lax.fori_loop(0, 5, shift, x).sum(0), "x")

        return jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False)(x)

    compiled = jax.jit(program).lower(x).compile()
    found = describe_program(compiled)
    assert found["collectives"]["all-reduce"] == {"count": 1, "bytes": 4 * 64}
    assert found["collectives"]["collective-permute"] == {"count": 5, "bytes": 5 * 4 * 2 * 64}
    memory = compiled.memory_analysis()
    assert found["argument_bytes"] == memory.argument_size_in_bytes == 4 * 2 * 64
    assert found["total_bytes"] == pytest.approx(
        memory.temp_size_in_bytes + 4 * 2 * 64 + 4 * 64 + memory.generated_code_size_in_bytes
    )
    assert found["largest_arrays"][0]["bytes"] == 4 * 2 * 64
