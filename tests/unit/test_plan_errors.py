"""Bad manifests are refused before anything is planned, by a named error with both values."""

import msgspec
import pytest

from wsync.errors import (
    ConfigError,
    DtypeMismatchError,
    FormatVersionError,
    ManifestError,
    MissingTensorError,
    RecipeError,
    ShapeMismatchError,
    UnknownTensorError,
)
from wsync.plan import PlanOptions, expand_plan, make_plan, sink_slice, source_slice
from wsync.spec import (
    Box,
    CopySpec,
    NodeGroup,
    RankInfo,
    SinkManifest,
    SinkRankManifest,
    SourceManifest,
    StorageSpec,
    TensorSpec,
    contiguous_strides,
    default_cluster,
)
from wsync.spec.cluster import Cluster
from wsync.spec.recipes import recipe_parts
from wsync.spec.serde import FORMAT_VERSION

HOST = RankInfo("h")
W = TensorSpec("w", (8, 6), "bfloat16")
WHOLE = Box.whole((8, 6))
COPY = CopySpec("w", "weight", WHOLE, 0, 0, (6, 1))


def source(*tensors: TensorSpec, shards=None) -> SourceManifest:
    tensors = tensors or (W,)
    shards = shards or tuple(((Box.whole(t.shape),) if not t.alias_of else (),) for t in tensors)
    return SourceManifest((HOST,) * len(shards[0]), tensors, shards)


def sink(copy: CopySpec = COPY, *, recipe="bf16", dtype="bfloat16", size=48, recipes=None) -> SinkManifest:
    recipes = {copy.tensor: recipe} if recipes is None else recipes
    return SinkManifest((SinkRankManifest("engine-7", 3, 4, HOST, recipes, (StorageSpec("s", dtype, size),), (copy,)),))


def copy(**changes) -> CopySpec:
    return msgspec.structs.replace(COPY, **changes)


SINK = "rank 3 of replica 'engine-7'"


@pytest.mark.parametrize(
    ("error", "sink_manifest", "says"),
    [
        (UnknownTensorError, sink(copy(tensor="v")), "needs tensor 'v', which is not among the source's 1"),
        (ManifestError, sink(recipes={}), "copies tensor 'w', but gives no recipe"),
        (RecipeError, sink(recipe="fp3"), "recipe 'fp3' is unknown"),
        (RecipeError, sink(copy(role="scale")), "needs part 'scale' of 'w', but recipe 'bf16' writes weight"),
        (
            ShapeMismatchError,
            sink(copy(box=Box((0, 0), (9, 6)))),
            r"shape \(9, 6\)\) of 'w'; the source has shape \(8, 6\)",
        ),
        (ShapeMismatchError, sink(copy(box=Box((-1, 0), (2, 6)))), r"offset \(-1, 0\)"),
        (ShapeMismatchError, sink(copy(box=Box((0,), (8,)))), r"the source has shape \(8, 6\)"),
        (ShapeMismatchError, sink(copy(dst_strides=(6,))), r"strides \(6,\)"),
        (DtypeMismatchError, sink(dtype="float16"), "keeps 'w' as float16 .*the wire carries bfloat16"),
        (ManifestError, sink(size=47), "elements 0 to 47 of storage 's', which has 47"),
        (ManifestError, sink(copy(dst_strides=(-6, 1))), "elements -42 to 5"),
        (ManifestError, sink(copy(dst_strides=(0, 1))), r"writes 8 elements of 'w' to one address \(stride 0\)"),
        (ManifestError, sink(copy(storage_idx=1)), "storage 1, but lists 1 storages"),
    ],
)
def test_a_sink_that_does_not_fit_is_named(error, sink_manifest, says):
    with pytest.raises(error, match=says) as e:
        make_plan(source(), sink_manifest)
    assert SINK in str(e.value)


def test_elements_that_nobody_holds_are_named_by_their_first_box():
    gap = (((Box((0, 0), (3, 6)),), (Box((5, 0), (3, 6)),)),)
    with pytest.raises(MissingTensorError, match=r"sink 0 needs 'w'.*offset \(3, 0\) of shape \(2, 6\)"):
        make_plan(source(shards=gap), sink())


def test_a_scale_needs_all_of_its_block_even_where_the_weight_is_not_needed():
    tensor = TensorSpec("w", (256, 128), "bfloat16")
    gap = (((Box((0, 0), (100, 128)),), (Box((128, 0), (128, 128)),)),)
    scale = CopySpec("w", "scale", Box((0, 0), (1, 1)), 0, 0, (1, 1))
    with pytest.raises(MissingTensorError, match=r"offset \(100, 0\) of shape \(28, 128\)"):
        make_plan(source(tensor, shards=gap), sink(scale, recipe="fp8_block128", dtype="float32"))
    other = msgspec.structs.replace(scale, box=Box((1, 0), (1, 1)))
    make_plan(source(tensor, shards=gap), sink(other, recipe="fp8_block128", dtype="float32"))


def quantised(name: str, shape, recipe: str, *, box=None, roles=("weight",), groups=()) -> SinkManifest:
    """One engine rank that takes parts of one tensor."""
    parts = [p for p in recipe_parts(name, shape, "bfloat16", recipe) if p.role in roles]
    storages = tuple(StorageSpec(p.name, p.dtype, 1 << 20) for p in parts)
    copies = tuple(
        CopySpec(name, p.role, box or Box.whole(p.shape), i, 0, contiguous_strides(p.shape))
        for i, p in enumerate(parts)
    )
    rank = SinkRankManifest("engine-7", 3, 4, HOST, {name: recipe}, storages, copies, groups)
    return SinkManifest((rank,))


@pytest.mark.parametrize(
    ("recipe", "group", "cut", "inside"), [("mxfp8", 32, 40, "32 to 63"), ("nvfp4", 16, 24, "16 to 31")]
)
def test_an_edge_inside_a_group_of_columns_is_named_on_either_side(recipe, group, cut, inside):
    tensor = TensorSpec("w", (8, 96), "bfloat16")
    whole = quantised("w", (8, 96), recipe)
    shards = (((Box((0, 0), (8, cut)),), (Box((0, cut), (8, 96 - cut)),)),)
    says = (
        f"{group} columns of 'w' together, but an edge of %s is at column {cut}, inside the group of columns {inside}"
    )
    with pytest.raises(RecipeError, match=says % "the shard of trainer rank 0"):
        make_plan(source(tensor, shards=shards), whole)
    packed = 2 if recipe == "nvfp4" else 1
    part = quantised("w", (8, 96), recipe, box=Box((0, cut // packed), (8, (96 - cut) // packed)))
    with pytest.raises(RecipeError, match=says % f"the box that {SINK} needs"):
        make_plan(source(tensor), part)
    with pytest.raises(RecipeError, match=rf"multiple of {group}, but 'v' has shape \(8, 88\)"):
        recipe_parts("v", (8, 88), "bfloat16", recipe)


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4"])
def test_scales_that_packing_makes_are_not_sent_without_their_weights(recipe):
    tensor = TensorSpec("w", (8, 96), "bfloat16")
    lone = quantised("w", (8, 96), recipe, roles=("scale",))
    with pytest.raises(ManifestError, match=rf"sink 0 needs 'w_scale' .*recipe '{recipe}' makes both together"):
        make_plan(source(tensor), lone)
    (other,) = quantised("w", (8, 96), recipe).ranks
    both = SinkManifest((*lone.ranks, msgspec.structs.replace(other, replica="engine-8")))
    assert make_plan(source(tensor), both).wire_bytes == 8 * 96 // (32 if recipe == "mxfp8" else 16) + (
        8 * 96 // (1 if recipe == "mxfp8" else 2)
    )


def test_scale_groups_that_cannot_be_are_named():
    tensors = (
        TensorSpec("a", (8, 32), "bfloat16"),
        TensorSpec("b", (4, 32), "bfloat16"),
        TensorSpec("stack", (2, 8, 32), "bfloat16"),
    )

    def plan(recipe, *groups):
        return make_plan(source(*tensors), quantised("a", (8, 32), recipe, groups=groups))

    for error, args, says in [
        (UnknownTensorError, ("fp8_tensor", ("a", "z")), "needs tensor 'z', which is not among the source's 3"),
        (
            ManifestError,
            ("fp8_tensor", ("a", "b"), ("b", "stack")),
            r"'b' in two scale groups: \['a', 'b'\] and \['b',",
        ),
        (ManifestError, ("fp8_channel", ("a", "b")), "'a' in a scale group, but recipe 'fp8_channel' has no scale of"),
        (ShapeMismatchError, ("nvfp4", ("a", "stack")), r"'a' of shape \(8, 32\) and 'stack' of shape \(2, 8, 32\)"),
    ]:
        with pytest.raises(error, match=says) as e:
            plan(*args)
        assert SINK in str(e.value)
    assert plan("fp8_tensor", ("b", "stack")).amax_elements == 1
    together = plan("fp8_tensor", ("a", "b"))
    whole = expand_plan(together)
    assert (together.amax_elements, next(p.group for p in whole.parts)) == (1, ("a", "b"))
    assert {whole.parts[r.part_idx].name for r in whole.amax_regions[0]} == {"a", "b"}


def test_an_empty_member_of_a_scale_group_takes_no_place_in_the_exchange():
    tensors = tuple(TensorSpec(n, (rows, 32), "bfloat16") for n, rows in (("a", 0), ("b", 8), ("c", 8)))
    copies = tuple(CopySpec(n, "weight", Box.whole((8, 32)), i, 0, (32, 1)) for i, n in enumerate("bc"))
    storages = tuple(StorageSpec(n, "float8_e4m3fn", 256) for n in "bc")
    recipes = dict.fromkeys("abc", "fp8_tensor")
    rank = SinkRankManifest("e", 0, 1, RankInfo("h"), recipes, storages, copies, scale_groups=(("a", "c"),))
    plan = make_plan(source(*tensors), SinkManifest((rank,)))
    whole = expand_plan(plan)
    offsets = {whole.parts[r.part_idx].name: r.grid_offset for r in whole.amax_regions[0]}
    assert (offsets, plan.amax_elements) == ({"b": 0, "c": 1}, 2)


def test_a_tensor_that_only_lends_its_amax_must_be_there():
    tensors = (TensorSpec("a", (8, 32), "bfloat16"), TensorSpec("b", (4, 32), "bfloat16"))
    gap = (((Box.whole((8, 32)),),), ((Box((0, 0), (3, 32)),),))
    with pytest.raises(
        MissingTensorError, match=r"'b' shares its amax with a, b, but .* offset \(3, 0\) of shape \(1, 32\)"
    ):
        make_plan(source(*tensors, shards=gap), quantised("a", (8, 32), "fp8_tensor", groups=(("a", "b"),)))


def test_sinks_that_group_differently_get_encodings_of_their_own():
    tensors = (TensorSpec("a", (8, 32), "bfloat16"), TensorSpec("b", (4, 32), "bfloat16"))
    one = quantised("a", (8, 32), "nvfp4", groups=(("a", "b"),)).ranks
    two = msgspec.structs.replace(quantised("a", (8, 32), "nvfp4").ranks[0], replica="engine-8")
    plan = make_plan(source(*tensors), SinkManifest((*one, two, msgspec.structs.replace(one[0], replica="engine-9"))))
    whole = expand_plan(plan)
    taken = {(whole.parts[p.part_idx].group, b.sinks) for b in whole.buckets for p in b.pieces}
    assert taken == {(("a", "b"), (0, 2)), ((), (1,))}
    assert plan.amax_elements == 2


def test_a_recipe_that_cannot_encode_the_tensor_names_it():
    with pytest.raises(RecipeError, match=r"rank 3 of replica 'engine-7'.*'b'.*\(8,\)"):
        make_plan(
            source(TensorSpec("b", (8,), "float32")),
            sink(CopySpec("b", "weight", Box.whole((8,)), 0, 0, (1,)), recipe="fp8_block128"),
        )


@pytest.mark.parametrize(
    ("error", "manifest", "says"),
    [
        (ShapeMismatchError, source(shards=(((Box((4, 0), (5, 6)),),),)), r"shard of 'w' on trainer rank 0.*\(8, 6\)"),
        (ShapeMismatchError, source(shards=(((Box((4,), (4,)),),),)), "has 1 dimensions"),
        (ManifestError, source(W, W), "'w' is in the source twice, at 0 and at 1"),
        (ManifestError, SourceManifest((HOST, HOST), (W,), (((WHOLE,),),)), "shards of 1 ranks, the source has 2"),
        (ManifestError, SourceManifest((HOST,), (W,), ()), "1 tensors, but shards of 0"),
        (ManifestError, SourceManifest((), (W,), ((),)), "at least 1 rank, got 0"),
        (DtypeMismatchError, source(TensorSpec("w", (8, 6), "complex64")), "complex64"),
        (ManifestError, source(TensorSpec("w", (1,) * 1100, "bool")), "'w' has 1100 dimensions, allowed are 32"),
        (ManifestError, source(TensorSpec("w", (-8, 6), "bool")), r"'w' has shape \(-8, 6\), allowed are sizes from 0"),
        (ManifestError, source(TensorSpec("w", (1 << 62, 2), "bool")), f"{1 << 63} bytes, allowed are {1 << 62}"),
        (ManifestError, source(TensorSpec("w", (8, 6), "bool", kind="x")), "'w' is of kind 'x', allowed are parameter"),
        (
            UnknownTensorError,
            source(W, TensorSpec("a", (8, 6), "bfloat16", alias_of="z")),
            "alias of 'z', which is not there",
        ),
        (ShapeMismatchError, source(W, TensorSpec("a", (8, 5), "bfloat16", alias_of="w")), r"\(8, 5\).*\(8, 6\)"),
        (DtypeMismatchError, source(W, TensorSpec("a", (8, 6), "float32", alias_of="w")), "float32.*bfloat16"),
        (ManifestError, source(W, TensorSpec("a", (8, 6), "bfloat16", alias_of="a")), "'a' is an alias of itself"),
    ],
)
def test_a_source_that_contradicts_itself_is_named(error, manifest, says):
    with pytest.raises(error, match=says):
        make_plan(manifest, sink())


def test_a_tensor_of_as_many_dimensions_as_are_allowed_is_planned():
    shape = (1,) * 30 + (8, 6)
    whole = CopySpec("w", "weight", Box.whole(shape), 0, 0, (48,) * 30 + (6, 1))
    assert make_plan(source(TensorSpec("w", shape, "bfloat16")), sink(whole)).wire_bytes == 96


def test_fp8_may_be_kept_in_memory_of_bytes_and_bytes_in_memory_of_fp8():
    fp8 = {"recipe": "fp8_block128", "size": 48}
    assert expand_plan(make_plan(source(), sink(**fp8, dtype="uint8"))).parts[0].dtype == "float8_e4m3fn"
    raw = source(TensorSpec("w", (8, 6), "uint8"))
    assert expand_plan(make_plan(raw, sink(recipe="raw", dtype="float8_e4m3fn"))).parts[0].dtype == "uint8"
    for other in ("int8", "bool", "float8_e5m2"):
        with pytest.raises(DtypeMismatchError, match=f"keeps 'w' as {other} .*the wire carries float8_e4m3fn"):
            make_plan(source(), sink(**fp8, dtype=other))


def test_a_plan_needs_an_engine():
    with pytest.raises(ManifestError, match="at least 1 engine rank, got 0"):
        make_plan(source(), SinkManifest(()))


@pytest.mark.parametrize("size", [0, -256, 100, 257, 1 << 41])
def test_impossible_bucket_sizes_are_refused(size):
    with pytest.raises(ConfigError, match=f"bucket_bytes is {size}, allowed are multiples of 256"):
        make_plan(source(), sink(), None, PlanOptions(size))


def test_a_bucket_has_room_for_a_scale_block():
    tensor = TensorSpec("w", (256, 128), "bfloat16")
    one = sink(
        CopySpec("w", "weight", Box.whole((256, 128)), 0, 0, (128, 1)),
        recipe="fp8_block128",
        dtype="float8_e4m3fn",
        size=1 << 15,
    )
    with pytest.raises(ConfigError, match="bucket_bytes is 8192, but one scale block of 'w' has 16384"):
        make_plan(source(tensor), one, None, PlanOptions(8192))
    make_plan(source(tensor), one, None, PlanOptions(16384))


def test_a_cluster_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="host 'h'"):
        make_plan(source(), sink(), default_cluster(["elsewhere"]))
    with pytest.raises(FormatVersionError):
        make_plan(source(), sink(), msgspec.structs.replace(default_cluster(["h"]), format_version=FORMAT_VERSION + 1))
    lonely = Cluster((NodeGroup("g", 2, 10.0, hosts=("h", "far")),))
    far = SinkManifest((msgspec.structs.replace(sink().ranks[0], info=RankInfo("far")),))
    with pytest.raises(
        ConfigError, match=r"no path from node 'h', where trainer rank 0 .* to node 'far', .*sink 0 .*0 nics"
    ):
        make_plan(source(), far, lonely)
    make_plan(source(), sink(), lonely)


def test_slices_of_ranks_that_do_not_exist_are_refused():
    plan = make_plan(source(), sink())
    with pytest.raises(ConfigError, match="trainer rank 1 is not in a plan of 1"):
        source_slice(plan, 1)
    with pytest.raises(ConfigError, match="sink -1 is not in a plan of 1"):
        sink_slice(plan, -1)


def test_hints_say_what_to_do():
    with pytest.raises(UnknownTensorError) as e:
        make_plan(source(TensorSpec("model.w.weight", (8, 6), "bfloat16")), sink(copy(tensor="modle.w.weight")))
    assert "the source has 'model.w.weight'" in e.value.hint
    with pytest.raises(UnknownTensorError) as e:
        make_plan(source(), sink(copy(tensor="something.else")))
    assert "against the trainer's own names" in e.value.hint
