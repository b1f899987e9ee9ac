"""The tables of docs/recipes.md list what exists, with the shapes that the code declares."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wsync.plan import layouts
from wsync.spec.recipes import RECIPES, recipe_parts

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
DTYPES = {"bf16": "bfloat16", "e4m3": "float8_e4m3fn", "f32": "float32", "uint8": "uint8"}
N, K = 200, 96
"""Of the example; neither is a multiple of 128."""


def table(heading: str) -> list[list[str]]:
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shape_of(text: str) -> tuple[int, ...]:
    """``[..., N, ceil(K/128)]`` with the numbers of the example and one outer dimension of 3."""
    dims = text.strip("[]").split(", ")
    numbers = {"...": 3, "N": N, "K": K, "1": 1, "K/32": K // 32, "K/16": K // 16, "K/2": K // 2}
    numbers |= {"ceil(N/128)": -(-N // 128), "ceil(K/128)": -(-K // 128)}
    return tuple(numbers[dim] for dim in dims)


def test_the_table_of_recipes_lists_exactly_the_recipes_in_their_order():
    assert [row[0].strip("`") for row in table("Recipes")] == list(RECIPES)


@pytest.mark.parametrize("row", [r for r in table("Recipes") if r[0] not in ("`raw`", "`bf16`")], ids=lambda r: r[0])
def test_the_table_has_the_dtypes_and_shapes_of_every_part(row):
    weight = re.match(r"(\w+) `(\[.*?\])`", row[1])
    scales = re.findall(r"`w(\w+)` (\w+)[^`]*`(\[.*?\])`", row[2])
    described = [("w", weight[1], weight[2]), *((f"w{suffix}", dtype, shape) for suffix, dtype, shape in scales)]
    declared = recipe_parts("w", (3, N, K), "bfloat16", row[0].strip("`"))
    assert [(n, DTYPES[d], shape_of(s)) for n, d, s in described] == [(p.name, p.dtype, p.shape) for p in declared]


def test_every_recipe_that_rounds_has_its_rule():
    rules = re.search(r"```\n(.*?)```", TEXT, re.S)[1]
    assert [line.split()[0] for line in rules.splitlines() if not line.startswith(" ")] == list(RECIPES)[2:]


def test_the_tables_of_layouts_name_functions_that_exist():
    names = [row[0].strip("`") for row in table("Layouts")]
    assert len(names) == 8
    public = {
        n for n, f in vars(layouts).items() if getattr(f, "__module__", "") == layouts.__name__ and n[0].islower()
    }
    assert set(names) == public - {"composed", "identity_rows"}
