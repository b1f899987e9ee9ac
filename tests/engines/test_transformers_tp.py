"""The transformers engine on two gloo processes gives the logits of the plain model."""

import os
import tempfile
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("transformers")
pytestmark = pytest.mark.multiproc

CASES = ["llama_biased", "mistral", "qwen2", "qwen3_tied", "qwen3_one_kv_head"]


def run_cases(rank, folder):
    from test_transformers_engine import CONFIGS, plain_model

    from wsync.adapters.engines.transformers import TransformersEngine

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in CASES:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
            outcome = ""
            try:
                config = CONFIGS[name]()
                model = plain_model(config, dtype)
                engine = TransformersEngine(config, tp_rank=rank, tp_size=2, dtype=dtype)
                engine.load_weights(model.state_dict().items())
                ids = torch.randint(0, config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
                with torch.no_grad():
                    torch.testing.assert_close(engine(ids), model(ids).logits, atol=tolerance, rtol=tolerance)
                assert engine.generate_greedy(ids, 3).shape == (2, 12)
            except BaseException:
                outcome = traceback.format_exc()
            with open(f"{folder}/{name}.{str(dtype).removeprefix('torch.')}.{rank}", "w") as f:
                f.write(outcome)
            if outcome:
                os._exit(1)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes():
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [context.Process(target=run_cases, args=(rank, folder)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(150)
            if process.is_alive():
                process.kill()
        found = {}
        for name in os.listdir(folder):
            if name != "store":
                with open(os.path.join(folder, name)) as f:
                    found[name] = f.read()
        yield found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_two_ranks_are_those_of_the_plain_model(name, dtype, outcomes):
    reports = [outcomes.get(f"{name}.{dtype}.{rank}", "did not finish") for rank in range(2)]
    assert reports == ["", ""], "\n".join(reports)
