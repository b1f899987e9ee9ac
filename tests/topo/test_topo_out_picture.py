"""Pictures: every part is there, nothing overlaps or leaves the page, health shows without colour, bytes repeat."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import machines as m
import numpy as np
import pytest
from recorded import FIXTURES, needs_fixtures

from wsync.topo.model import Topology
from wsync.topo.parse import read_files, read_texts
from wsync.topo.render.layout import find_frames
from wsync.topo.render.panel import BOX, GPU_HEIGHT, NIC_HEIGHT
from wsync.topo.render.picture import draw_topology
from wsync.topo.render.png import png_bytes
from wsync.topo.render.scene import INKS, PAPER, Arc, Line, Rect, Text, text_width
from wsync.topo.render.svg import svg_text
from wsync.topo.report import check_topology

GOLDEN = Path(__file__).parents[2] / "docs" / "topo_lost_nvlinks.svg"
FAULTY = m.isolate(m.h100(), 2)


def topology_of(*boxes):
    return Topology(tuple(read_texts([("t", m.topo_m(b))], f"n{i}").machines[0] for i, b in enumerate(boxes)))


def scene_of(topology):
    return draw_topology(topology, check_topology(topology))


def texts(scene):
    return [s.text for s in scene.shapes if isinstance(s, Text)]


def boxes(scene):
    return [s for s in scene.shapes if isinstance(s, Rect) and s.width == BOX and s.height in (GPU_HEIGHT, NIC_HEIGHT)]


def box_of(scene, label):
    """The box around a label."""
    at = next(s for s in scene.shapes if isinstance(s, Text) and s.text == label)
    return next(b for b in boxes(scene) if b.x <= at.x <= b.x + b.width and b.y <= at.y <= b.y + b.height)


def corners(shape):
    if isinstance(shape, Rect):
        return [(shape.x, shape.y), (shape.x + shape.width, shape.y + shape.height)]
    if isinstance(shape, Line):
        return list(shape.points)
    if isinstance(shape, Arc):
        return [shape.start, shape.end, (shape.start[0], shape.top)]
    shift = {"start": 0.0, "middle": -0.5, "end": -1.0}[shape.anchor] * text_width(shape.text, shape.size)
    return [(shape.x + shift, shape.y - shape.size), (shape.x + shift + text_width(shape.text, shape.size), shape.y)]


def assert_legible(scene, num_devices):
    """Everything lies on the page, and no two devices lie over each other."""
    for shape in scene.shapes:
        for x, y in corners(shape):
            assert -1 <= x <= scene.width + 1, shape
            assert -1 <= y <= scene.height + 1, shape
    found = boxes(scene)
    assert len(found) == num_devices
    for a, b in itertools.combinations(found, 2):
        apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
        assert apart, (a, b)


@pytest.mark.parametrize("name", m.HEALTHY)
@pytest.mark.parametrize("write", [m.topo_m, m.system_xml], ids=["topo_m", "xml"])
def test_every_healthy_machine_is_drawn_whole_and_without_a_mark(name, write):
    box = m.HEALTHY[name]()
    topology = Topology(read_texts([("t", write(box)), ("q", m.query_all(box))], "n").machines)
    scene = scene_of(topology)
    assert_legible(scene, len(box.gpus) + len(box.nics))
    written = texts(scene)
    assert all(written.count(g) == 1 for g in box.gpu_names)
    assert all(any(n in t for t in written) for n in box.nic_names)
    assert "n: OK" in written
    assert not [t for t in written if t in ("!", "!!")]


@needs_fixtures
def test_every_recorded_machine_is_drawn_whole():
    drawn = 0
    for path in sorted(FIXTURES.rglob("*")):
        if path.is_file() and path.suffix in (".txt", ".xml", ".log", ".json", ".csv"):
            topology = read_files([path])
            scene = scene_of(topology)
            gpus = {g.label for x in topology.machines for g in x.gpus}
            ghosts = {"GPU7"} if "gpu7_lost" in path.name else set()
            if len(topology.machines) <= 4:
                assert_legible(scene, sum(len(x.gpus) + len(x.nics) for x in topology.machines) + len(ghosts))
                assert gpus | ghosts <= set(texts(scene))
            ElementTree.fromstring(svg_text(scene))
            drawn += 1
    assert drawn > 90


def test_names_fit_into_their_boxes_by_the_fonts_own_measure():
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    topology = Topology(read_texts([("t", m.topo_m(m.h100())), ("q", m.query_all(m.h100()))], "n").machines)
    scene = scene_of(topology)
    checked = 0
    for text in (s for s in scene.shapes if isinstance(s, Text)):
        font = FontProperties(family="DejaVu Sans", weight="bold" if text.bold else "normal")
        real = TextPath((0, 0), text.text, size=text.size, prop=font).get_extents().width
        assert real <= text_width(text.text, text.size, text.bold), text
        around = [b for b in boxes(scene) if b.x < text.x < b.x + b.width and b.y < text.y < b.y + b.height]
        if around and text.anchor == "middle":
            assert real <= BOX, text
            checked += 1
    assert checked >= 8 * 3 + 10


# ---- health


def test_an_isolated_gpu_has_a_broken_line_a_mark_and_the_only_coloured_box():
    scene = scene_of(topology_of(FAULTY))
    ink = INKS["CRIT"]
    coloured = [b for b in boxes(scene) if b.stroke == ink.stroke]
    assert coloured == [box_of(scene, "GPU2")]
    lines = [s for s in scene.shapes if isinstance(s, Line) and s.stroke == ink.stroke and s.title]
    assert len(lines) == 1
    assert lines[0].dash
    assert lines[0].points[0][0] == coloured[0].x + BOX / 2
    assert "0 of 18 !!" in texts(scene)
    assert texts(scene).count("18") == 7
    assert "nvlink.gpu-isolated" in lines[0].title


def test_the_weak_pair_of_a_mesh_is_the_only_broken_arc():
    scene = scene_of(topology_of(m.weaken(m.dgx1(), 0, 3)))
    arcs = [s for s in scene.shapes if isinstance(s, Arc)]
    assert len(arcs) == 16
    (broken,) = [a for a in arcs if a.dash]
    for end, label in ((broken.start, "GPU0"), (broken.end, "GPU3")):
        box = box_of(scene, label)
        assert box.x < end[0] < box.x + BOX
    assert "1 !!" in texts(scene)


def test_a_lost_gpu_is_drawn_as_missing_and_its_peers_are_not_blamed():
    box = m.dgx1()
    nv = tuple(row[:7] for row in box.nv[:7])
    left = m.dataclasses.replace(box, gpus=box.gpus[:7], nv=nv)
    scene = scene_of(topology_of(left))
    assert "not listed" in texts(scene)
    blamed = [b for b in boxes(scene) if b.stroke == INKS["CRIT"].stroke]
    assert blamed == [box_of(scene, "GPU7")]


def test_a_slow_uplink_colours_the_way_to_the_cpu_and_not_that_below():
    topology = Topology(read_texts([("x", m.system_xml(m.h100(), uplink="5.0 GT/s PCIe"))]).machines)
    lines = [s for s in scene_of(topology).shapes if isinstance(s, Line) and s.title]
    slow = [s for s in lines if s.stroke == INKS["WARN"].stroke]
    assert slow
    assert all("pcie.uplink-slow" in s.title and len(s.points) == 3 for s in slow)
    assert [s for s in lines if s.title.startswith("PCIe Gen5") and s.stroke == INKS[None].stroke]


def test_many_machines_are_tiles_with_the_faulty_first():
    scene = scene_of(topology_of(*[m.h100()] * 5, FAULTY, m.h100()))
    written = texts(scene)
    assert written[0] == "7 machines: CRIT"
    names = [t for t in written if re.fullmatch(r"n\d", t)]
    assert names == ["n5", "n0", "n1", "n2", "n3", "n4", "n6"]
    squares = [s for s in scene.shapes if isinstance(s, Rect) and s.title.startswith("GPU")]
    assert len(squares) == 7 * 8
    assert [s.title for s in squares if s.stroke == INKS["CRIT"].stroke] == ["GPU2"]


def test_a_thousand_machines_fit_on_a_picture():
    one = read_texts([("t", m.topo_m(m.h100()))]).machines[0]
    topology = Topology(tuple(m_replace(one, f"n{i}") for i in range(1000)))
    scene = scene_of(topology)
    assert 1 < scene.width / scene.height < 4
    assert texts(scene)[0] == "1000 machines: OK"


def m_replace(machine, host):
    from msgspec.structs import replace

    return replace(machine, host=host)


def test_nothing_at_all_is_drawn_as_such():
    scene = scene_of(Topology(()))
    assert texts(scene)[0] == "0 machines: UNKNOWN"
    ElementTree.fromstring(svg_text(scene))


# ---- layout


def test_frames_are_numa_nodes_and_groups_share_a_switch():
    for write in (m.topo_m, m.system_xml):
        (machine,) = read_texts([("t", write(m.dgx1()))]).machines
        frames = find_frames(machine)
        assert [f.numa for f in frames] == [(0,), (1,)]
        shape = [[([g.index for g in x.gpus], [n.label for n in x.nics]) for x in f.groups] for f in frames]
        assert shape == [
            [([0, 1], ["mlx5_0"]), ([2, 3], ["mlx5_1"])],
            [([4, 5], ["mlx5_2"]), ([6, 7], ["mlx5_3"])],
        ]
        assert all(g.switched for f in frames for g in f.groups)


def test_what_has_no_place_is_not_given_one():
    (machine,) = read_texts([("t", m.topo_m(m.h100_vm()))]).machines
    frames = find_frames(machine)
    assert [f.placed for f in frames] == [True, True, False]
    assert [n.label for n in frames[2].groups[0].nics] == ["mlx5_0"]


# ---- files


def test_the_same_report_gives_the_same_bytes():
    first, second = (scene_of(topology_of(FAULTY)) for _ in range(2))
    assert svg_text(first) == svg_text(second)
    assert png_bytes(first, 1.0) == png_bytes(second, 1.0)


def test_the_picture_in_the_docs_is_what_the_command_draws(tmp_path):
    from wsync.cli.main import main

    source, target = tmp_path / "t.xml", tmp_path / "t.svg"
    source.write_text(m.system_xml(FAULTY))
    main(["topo", "check", str(source), "--host", "node7", "--svg", str(target)])
    assert target.read_text() == GOLDEN.read_text()


def test_svg_names_what_could_break_it():
    topology = topology_of(FAULTY)
    scene = scene_of(Topology((m_replace(topology.machines[0], '<a href="x">&\x00\x1b'),)))
    root = ElementTree.fromstring(svg_text(scene))
    assert root[0].text.startswith('<a href="x">&  : CRIT')
    assert png_bytes(scene, 0.2)


def test_the_png_shows_what_the_scene_has():
    """A pixel in the middle of a box has its ink's fill, one on a line has its stroke."""
    from matplotlib.image import imread

    scene = scene_of(topology_of(FAULTY))
    image = imread(io.BytesIO(png_bytes(scene, 1.0)), format="png")
    assert image.shape[:2] == (round(scene.height), round(scene.width))
    box = box_of(scene, "GPU2")
    assert np.allclose(image[int(box.y + 8), int(box.x + 8)][:3], rgb(INKS["CRIT"].fill), atol=0.03)
    box = box_of(scene, "GPU5")
    assert np.allclose(image[int(box.y + 8), int(box.x + 8)][:3], rgb(INKS[None].fill), atol=0.03)
    wire = next(s for s in scene.shapes if isinstance(s, Line) and s.title == "GPU5: 18 NVLinks")
    (x, y), _ = wire.points
    assert np.allclose(image[int(y + 4), int(x)][:3], rgb(INKS[None].stroke), atol=0.1)
    assert np.allclose(image[2, 2][:3], rgb(PAPER), atol=0.01)


# ---- colours


def rgb(text):
    return np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)])


# Source: Machado, Oliveira, Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# severity 1.0.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(colour):
    """CIE L*a*b* under D65 of a linear sRGB colour."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ colour
    f = np.where((t := xyz / [0.9505, 1.0, 1.089]) > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def seen(text, kind):
    values = rgb(text)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return lab(np.clip(BLINDNESS[kind] @ linear, 0, 1))


@pytest.mark.parametrize("kind", BLINDNESS)
def test_healths_differ_for_every_colour_blindness(kind):
    inks = [INKS[s].stroke for s in (None, "WARN", "CRIT", "UNKNOWN")]
    for a, b in itertools.combinations(inks, 2):
        assert np.linalg.norm(seen(a, kind) - seen(b, kind)) > 20, (a, b)


def test_healths_differ_without_colour():
    inks = [INKS[s] for s in (None, "WARN", "CRIT", "UNKNOWN")]
    assert len({i.dash for i in inks}) == len(inks)
    assert len({i.mark for i in inks}) == len(inks)
