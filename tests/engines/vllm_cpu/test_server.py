"""The servers that tests of the HTTP road run on."""

import pytest

from vllm_cpu.harness import MAX_TOKENS, PROMPTS, EngineError, compare_dumps
from vllm_cpu.server import Server

pytestmark = pytest.mark.multiproc


def test_a_server_says_and_holds_what_an_engine_in_one_process_does(lab):
    reference = lab.fresh("qwen2", 1)
    with Server(lab.model("qwen2", 1)) as server:
        for prompt, expected in zip(PROMPTS, reference.outputs, strict=True):
            choice = server.complete(prompt, MAX_TOKENS, return_token_ids=True)
            assert choice["token_ids"] == expected["token_ids"]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected["logprobs"])
        assert compare_dumps(server.dump(), reference.dump) == []
        with pytest.raises(EngineError, match="no_such_model") as caught:
            server.complete("x", 1, model="no_such_model")
        assert caught.value.kind == "404"
        server.kill()
        with pytest.raises(EngineError) as caught:
            server.complete("x", 1)
        assert caught.value.kind == "Ended"
        assert not server.is_healthy()


def test_a_server_that_cannot_start_is_reported_with_the_end_of_its_log(lab, tmp_path):
    with pytest.raises(EngineError, match=r"server\.log") as caught:
        Server(tmp_path)
    assert caught.value.kind == "Ended"
    assert str(tmp_path) in str(caught.value)


@pytest.mark.deep
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)])
def test_a_server_has_as_many_ranks_as_it_is_told(lab, tp, dp):
    reference = lab.fresh("qwen2", 1, tp=tp)
    with Server(lab.model("qwen2", 1), tp=tp, dp=dp) as server:
        assert server.request("/get_world_size")["world_size"] == 2
        server.complete("x", 1)
        dump = server.dump()
        assert {name.split("/")[0] for name in dump} == {"rank0", "rank1"}
        for rank in range(2):
            theirs = f"rank{rank if tp > 1 else 0}/"
            ours = {n.removeprefix(f"rank{rank}/"): h for n, h in dump.items() if n.startswith(f"rank{rank}/")}
            expected = {n.removeprefix(theirs): h for n, h in reference.dump.items() if n.startswith(theirs)}
            assert compare_dumps(ours, expected) == []
