"""Blocks, read off layer names."""

from __future__ import annotations

from svdq_cli.planning.blocks import Place, blocks_of, in_blocks, places_of

FLUX = [
    "x_embedder",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.ff.net.2",
    "transformer_blocks.1.attn.to_q",
    "transformer_blocks.1.attn.to_out.0",
]


def test_a_block_is_the_deepest_number_that_holds_several_layers():
    places = places_of(FLUX)
    assert places["transformer_blocks.0.attn.to_out.0"] == Place("transformer_blocks.*", "0", "attn.to_out.0")
    assert places["transformer_blocks.0.ff.net.2"] == Place("transformer_blocks.*", "0", "ff.net.2")
    assert places["x_embedder"] == Place("", "", "x_embedder")


def test_blocks_within_blocks_are_numbered_by_all_levels():
    names = [
        f"down.{i}.attentions.1.blocks.{j}.{role}"
        for i in (1, 2)
        for j in (0, 1)
        for role in ("to_q", "ff.0")
    ]
    place = places_of(names)["down.2.attentions.1.blocks.0.to_q"]
    assert place == Place("down.*.attentions.*.blocks.*", "2.1.0", "to_q")


def test_layers_of_a_block_stand_together_and_those_outside_come_last():
    late = [*FLUX, "transformer_blocks.0.norm.linear"]
    ordered = in_blocks(late, places_of(late))
    assert ordered[3] == "transformer_blocks.0.norm.linear"
    assert ordered[-1] == "x_embedder"
    assert sorted(ordered) == sorted(late)


def test_a_block_has_its_path_and_a_layer_its_pattern():
    place = places_of(FLUX)["transformer_blocks.1.attn.to_out.0"]
    assert (place.path, place.pattern) == ("transformer_blocks.1", "transformer_blocks.*.attn.to_out.0")
    outside = places_of(FLUX)["x_embedder"]
    assert (outside.path, outside.pattern) == ("", "x_embedder")


def test_a_block_that_holds_blocks_is_none_of_its_own():
    inner = [f"down.1.attentions.0.blocks.{j}.{role}" for j in (0, 1) for role in ("to_q", "to_k")]
    names = ["down.1.attentions.0.proj_in", "down.1.attentions.0.proj_out", *inner]
    assert blocks_of(names) == ("down.1.attentions.0.blocks.0", "down.1.attentions.0.blocks.1")
