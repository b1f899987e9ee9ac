"""Values that everything else speaks in: boxes, dtypes, manifests, recipes, the cluster file, and their encoding."""

from wsync.spec.box import Box, contiguous_strides
from wsync.spec.cluster import (
    Cluster,
    Link,
    Nic,
    NicPath,
    NodeGroup,
    check_cluster,
    decode_cluster,
    default_cluster,
    dump_cluster,
    encode_cluster,
    load_cluster,
)
from wsync.spec.dtypes import ITEMSIZE, itemsize
from wsync.spec.manifest import (
    CopySpec,
    RankInfo,
    SinkManifest,
    SinkRankManifest,
    SourceManifest,
    SourceRankManifest,
    StorageSpec,
    TensorSpec,
    merge_source,
)
from wsync.spec.recipes import RECIPES, SCALE_BLOCK, PartSpec, Recipe, get_recipe, recipe_parts, scale_grid
from wsync.spec.serde import FORMAT_VERSION, check_format, decode, digest_of, encode

__all__ = [
    "FORMAT_VERSION",
    "ITEMSIZE",
    "RECIPES",
    "SCALE_BLOCK",
    "Box",
    "Cluster",
    "CopySpec",
    "Link",
    "Nic",
    "NicPath",
    "NodeGroup",
    "PartSpec",
    "RankInfo",
    "Recipe",
    "SinkManifest",
    "SinkRankManifest",
    "SourceManifest",
    "SourceRankManifest",
    "StorageSpec",
    "TensorSpec",
    "check_cluster",
    "check_format",
    "contiguous_strides",
    "decode",
    "decode_cluster",
    "default_cluster",
    "digest_of",
    "dump_cluster",
    "encode",
    "encode_cluster",
    "get_recipe",
    "itemsize",
    "load_cluster",
    "merge_source",
    "recipe_parts",
    "scale_grid",
]
