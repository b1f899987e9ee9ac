"""A plain training loop that feeds a second process: ten lines of wsync around any model.

wsync keygen wsync.key
python examples/plain_loop.py engine &        # holds a copy of the model, and takes every version
python examples/plain_loop.py trainer         # trains, and publishes after each step
"""

import sys

import torch

import wsync

STORE, STEPS = "tcp://127.0.0.1:29600", 3


def make_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))


def trainer() -> None:
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with wsync.Source(model, store=STORE, key_file="wsync.key") as source:
        for step in range(1, STEPS + 1):
            model(torch.randn(32, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            publication = source.publish(version=step)
            publication.wait_released()  # from here on the next step may change the weights
            report = publication.wait_committed()
            print(f"step {step}: {report.committed} serve version {report.version}, {report.seconds['total']:.3f} s")
    print(f"trainer: checksum {sum(p.double().sum() for p in model.parameters()):.9f}")


def engine() -> None:
    model = make_model().requires_grad_(False)
    with wsync.Sink(model, store=STORE, key_file="wsync.key", replica="engine-0") as sink:
        while sink.version != STEPS:
            ticket = sink.prepare()  # or sink.start() once, and sink.poll() between generation steps
            sink.commit(ticket)
    print(f"engine: checksum {sum(p.double().sum() for p in model.parameters()):.9f}")


if __name__ == "__main__":
    engine() if sys.argv[1:] == ["engine"] else trainer()
