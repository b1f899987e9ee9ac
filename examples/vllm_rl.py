"""A training loop over two FSDP2 ranks that feeds a vLLM server while it serves. Everything on this machine.

python examples/vllm_rl.py                   # makes a toy model, starts the server and two trainer ranks
python examples/vllm_rl.py --model <folder>  # a checkpoint of your own; it has to fit twice into this machine's memory

The server needs `pip install wsync-rl[vllm]`; the trainer needs torch and transformers alone. The model learns to go on
with WANTED after PROMPT, in three steps; after each publish the server is asked what it thinks of WANTED now, and
the trainer computes the same from its own weights.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import wsync

NUM_RANKS, NUM_STEPS = 2, 3
PROMPT, WANTED = [3, 14, 15, 92], [65, 35, 89, 79]  # token ids: any model of 93 tokens or more has them
QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}


def train(rank: int, args: argparse.Namespace) -> None:
    """One trainer rank: what `torchrun` would start."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    from wsync.integrations.vllm import Fleet, HTTPServer

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.rendezvous}", rank=rank, world_size=NUM_RANKS)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.tensor([PROMPT + WANTED])
    labels = torch.tensor([[-100] * len(PROMPT) + WANTED])

    def show(what: str) -> None:
        """What server and trainer think of WANTED: mean log-probability of a token."""
        with torch.no_grad():  # on both ranks: FSDP gathers layer after layer
            ours = -model(tokens, labels=labels).loss.item()
        if rank == 0:
            generated, theirs = ask(args.server)
            version = server.weight_info()["weight_version"]
            print(f"{what}: weight_version {version!r}, generates {generated}, ", end="")
            print(f"log p of WANTED: server {theirs:.4f}, trainer {ours:.4f}", flush=True)

    server = HTTPServer(args.server)
    source = wsync.Source(model, store=f"tcp://127.0.0.1:{args.store}", key_file=args.key_file)
    with source, Fleet(source, [server], key_file=args.key_file) as fleet:
        show("the checkpoint")
        for step in range(1, NUM_STEPS + 1):
            model(tokens, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            publication = fleet.publish(version=step)
            publication.wait_released()  # from here on the next step may change the weights
            servers = publication.wait_committed().servers
            show("; ".join(f"{name} {s.state}, paused {1e3 * s.pause_s:.0f} ms" for name, s in servers.items()))
    dist.destroy_process_group()


def ask(url: str) -> tuple[list[int], float]:
    """What the server generates after PROMPT, greedily, and what it thinks of WANTED in that place."""
    generated = complete(url, prompt=PROMPT, max_tokens=len(WANTED), return_token_ids=True)["token_ids"]
    echoed = complete(url, prompt=PROMPT + WANTED, max_tokens=1, echo=True, logprobs=1)["logprobs"]["token_logprobs"]
    return generated, sum(echoed[len(PROMPT) : len(PROMPT) + len(WANTED)]) / len(WANTED)


def complete(url: str, **options: object) -> dict:
    body = {"model": "toy", "temperature": 0, **options}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]


def make_toy_model(folder: Path) -> Path:
    """A Llama of a hundred thousand weights with a tokenizer of 512 entries."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["hello world"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def start_server(model: str, port: int, key_file: str, log: Path) -> subprocess.Popen:
    """A vLLM server with wsync's backend. Its development routes are open, so it listens on this machine alone."""
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--served-model-name",
        "toy",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "256"]
    command += ["--max-num-seqs", "8", "--enforce-eager", "--gpu-memory-utilization", "0.2"]
    command += ["--weight-transfer-config", '{"backend": "wsync"}']
    environment = {**os.environ, **QUIET, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def wait_for(url: str, server: subprocess.Popen, log: Path, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server ended; the last of its log:\n{log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"the server is not there after {timeout_s:g} s; the last of its log:\n{log.read_text()[-3000:]}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def main() -> None:
    import torch.multiprocessing as mp

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a checkpoint; default: a toy model that is made here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or str(make_toy_model(Path(folder) / "model"))
        args.key_file = str(wsync.new_key_file(Path(folder) / "wsync.key"))
        port, args.store, args.rendezvous = free_ports(3)
        args.server = f"http://127.0.0.1:{port}"
        log = Path(folder) / "server.log"
        server = start_server(args.model, port, args.key_file, log)
        try:
            wait_for(args.server, server, log)
            os.environ["OMP_NUM_THREADS"] = "1"
            mp.spawn(train, args=(args,), nprocs=NUM_RANKS)
        finally:
            server.terminate()
            server.wait(timeout=60)


if __name__ == "__main__":
    main()
