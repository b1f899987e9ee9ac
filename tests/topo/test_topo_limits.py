"""Inputs that would keep a check busy, that it would wait for, or whose numbers no machine has."""

from __future__ import annotations

import os
import re
import signal

import machines as m
import pytest
from test_topo_bandwidth import nccl_tests

from wsync.cli.main import main
from wsync.errors import ConfigError
from wsync.topo import files
from wsync.topo.files import read_regular
from wsync.topo.golden import make_golden, save_golden
from wsync.topo.model import Gpu, Machine, Path, Topology
from wsync.topo.parse import host_files, nvlink, read_files, read_texts
from wsync.topo.parse.saved import encode_topology
from wsync.topo.view import View


def test_many_errors_in_one_line_are_each_read_up_to_the_next():
    text = "NVRM: Xid (PCI:0000:18:00): 45, x " + "NVRM: Xid (PCI:0000:19:00): 79, previous Xid 74 "
    xids = host_files.parse_kernel(text, "a").xids
    assert [(x.bus_id, x.code, x.cause) for x in xids] == [("0000:18:00.0", 45, None), ("0000:19:00.0", 79, 74)]


def test_a_line_too_long_for_a_link_is_passed_over():
    text = "GPU 0: A\n\t Link 0: 25 GB/s\n\t Link 1:" + " " * 5000 + "25 GB/s\n"
    assert [x.index for x in nvlink.parse_nvlink(text, "a")[0].gpus[0].nvlinks] == [0]


def test_pairs_of_gpus_are_those_that_an_input_tells():
    class Counted(View):
        asked = 0

        def path(self, a, b):
            Counted.asked += 1
            return super().path(a, b)

    view = Counted(Machine(gpus=tuple(Gpu(i) for i in range(3000)), paths=(Path("GPU7", "GPU3", "NV", 4),)))
    assert list(view.gpu_paths) == [(3, 7)]
    assert Counted.asked == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"index": 0', '"index": -1'), "a GPU's index is -1"),
        (('"index": 0', '"index": 123456'), "a GPU's index is 123456"),
        (('"links": 4', '"links": -3'), "NVLinks of GPU0 to GPU1 is -3"),
        (('"rate_gbit": 400.0', '"rate_gbit": -400.0'), "Gbit/s of mlx5_0 is -400"),
    ],
)
def test_a_saved_topology_with_numbers_of_no_machine_is_refused_by_name(change, message):
    from wsync.topo.model import Nic

    machine = Machine(
        gpus=(Gpu(0), Gpu(1)), nics=(Nic("mlx5_0", rate_gbit=400.0),), paths=(Path("GPU0", "GPU1", "NV", 4),)
    )
    text = encode_topology(Topology((machine,))).decode()
    assert change[0] in text
    (read,) = read_texts([("a.json", text.replace(*change))]).machines
    assert any(g.fatal and message in g.what for g in read.gaps)


def test_a_saved_topology_of_more_devices_than_any_machine_is_refused():
    text = encode_topology(Topology((Machine(gpus=tuple(Gpu(i) for i in range(5000))),))).decode()
    (read,) = read_texts([("a.json", text)]).machines
    assert re.search(r"5000 GPUs, allowed are \d+", read.gaps[0].what)


def test_a_named_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (read,) = read_files([tmp_path / "pipe"]).machines
    assert read.gaps[0].fatal
    assert "no regular file" in read.gaps[0].what


@pytest.fixture
def deadline():
    """A read that waits for ever fails its test instead."""

    def stop(signum, frame):
        raise TimeoutError("waited for a named pipe")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize(
    "words",
    [
        "check PIPE", "check FOLDER", "save PIPE --output OUT", "plan PIPE --bytes 1e9", "plan TOPO --plan PIPE",
        "lint PIPE", "lint --env PIPE", "lint --env /dev/null --machine PIPE", "golden save PIPE --output OUT",
        "golden check PIPE TOPO", "golden check GOLD PIPE", "golden diff PIPE PIPE", "compare PIPE TOPO",
        "import-bandwidth PIPE", "achieved PIPE --plan PIPE", "achieved TOPO --plan PIPE", "advise PIPE",
    ],
)  # fmt: skip
def test_no_command_waits_for_a_named_pipe(words, tmp_path, capsys, deadline):
    folder = tmp_path / "folder"
    folder.mkdir()
    for pipe in (tmp_path / "pipe", folder / "pipe"):
        os.mkfifo(pipe)
    (tmp_path / "topo").write_text(m.topo_m(m.h100()))
    save_golden(make_golden(read_files([tmp_path / "topo"]).machines), tmp_path / "gold")
    places = {word: tmp_path / word.lower() for word in ("PIPE", "FOLDER", "TOPO", "GOLD", "OUT")}
    assert main(["topo", *(str(places.get(word, word)) for word in words.split())]) == 3
    both = capsys.readouterr()
    assert "is no regular file" in both.out + both.err or words == "check FOLDER"


def shell_pipe(data):
    """What a shell makes of ``<(command)``: the number of an open pipe, and its other end."""
    reads, writes = os.pipe()
    os.write(writes, data)
    return f"/dev/fd/{reads}", reads, writes


def test_what_a_shell_pipes_in_under_a_name_is_read_to_its_end(capsys):
    text = m.topo_m(m.h100()).encode()
    path, reads, writes = shell_pipe(text)
    os.close(writes)
    assert main(["topo", "check", path]) == 0
    assert "8 GPUs" in capsys.readouterr().out
    os.close(reads)
    path, reads, writes = shell_pipe(b"abcdef")
    os.close(writes)
    assert read_regular(path, 4) == b"abcd"
    os.close(reads)


def test_a_command_that_never_ends_is_not_waited_for(monkeypatch, deadline):
    monkeypatch.setattr(files, "_PIPE_S", 0.2)
    path, reads, writes = shell_pipe(b"abc")
    with pytest.raises(ConfigError) as error:
        read_regular(path)
    assert error.value.message == f"{path} was not written to its end within 0.2 s"
    os.close(reads)
    os.close(writes)


def test_a_regular_file_that_the_kernel_makes_up_is_read():
    assert os.stat("/proc/self/status").st_size == 0
    assert len(read_regular("/proc/self/status")) > 100
    assert read_regular("/proc/self/status", 4) == b"Name"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_what_powershell_wrote_is_read_by_every_command(encoding, tmp_path, capsys):
    texts = {
        "topo": m.topo_m(m.h100()),
        "env": "NCCL_P2P_DISABLE=1",
        "xml": m.system_xml(m.h100()),
        "bench": nccl_tests("broadcast", 233.1),
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert main(["topo", "check", str(tmp_path / "topo")]) == 0
    assert main(["topo", "lint", "--env", str(tmp_path / "env")]) == 1
    assert "NCCL_P2P_DISABLE=1 in env, line 1" in capsys.readouterr().out
    assert main(["topo", "lint", str(tmp_path / "xml")]) == 0
    assert main(["topo", "import-bandwidth", str(tmp_path / "bench")]) == 0
    assert "233" in capsys.readouterr().out


def test_a_dash_is_stdin(monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"GPU 0: A\n\t Link 0: 25 GB/s\n")))
    (read,) = read_files(["-"]).machines
    assert read.gpus[0].nvlinks[0].active


def test_a_header_that_lost_a_number_is_no_header():
    (read,) = read_texts([("a", "\tGPU0\tGPU1\tGPU\nGPU0\tX\tNV1\tNV1\nGPU1\tNV1\tX\tNV1\n")]).machines
    assert "header" in read.gaps[0].what


def test_a_rate_that_no_link_has_is_passed_over_and_what_is_saved_can_be_read():
    from wsync.topo.parse.saved import decode_topology

    text = "GPU 0: A\n\t Link 0: 25 GB/s\n\t Link 1: 9999980 GB/s\n"
    topology = read_texts([("a", text)])
    assert [x.rate_gbps for x in topology.machines[0].gpus[0].nvlinks] == [25.0]
    assert decode_topology(encode_topology(topology).decode(), "a.json") == topology.machines
    port = "Infiniband device 'mlx5_{}' port 1 status:\n\tstate: 4: ACTIVE\n\trate: {} Gb/sec (4X)\n"
    rates = ["400", "0", "9999400", "25.78", "9" * 400]
    topology = read_texts([("b", "".join(port.format(i, rate) for i, rate in enumerate(rates)))])
    assert [n.rate_gbit for n in topology.machines[0].nics] == [400.0, None, None, 25.78, None]
    assert decode_topology(encode_topology(topology).decode(), "b.json") == topology.machines
