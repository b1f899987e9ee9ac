#include <pybind11/numpy.h>

#include "api/gil.h"
#include "api/register.h"
#include "shm/segment.h"

namespace py = pybind11;

namespace wsync {
namespace {

using shm::Geometry;
using shm::Segment;

void raise_named(const Error& error, const std::string& hint) {
  const py::object type = py::module_::import("wsync.errors").attr(error.leaf());
  const py::object value = type(error.what(), py::arg("hint") = hint);
  PyErr_SetObject(type.ptr(), value.ptr());
}

// Before the translator of wsync::Error, which knows no hint.
void translate(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const shm::HintedError& error) {
    raise_named(error, error.hint());
  } catch (const Error& error) {
    raise_named(error, "");
  }
}

Geometry geometry(std::uint32_t rank, std::uint32_t num_openers, std::uint64_t num_buckets, std::uint64_t bucket_bytes,
                  std::uint64_t exchange_elements, std::uint64_t plan_token) {
  Geometry out;
  out.rank = rank;
  out.num_openers = num_openers;
  out.num_buckets = num_buckets;
  out.bucket_bytes = bucket_bytes;
  out.exchange_elements = exchange_elements;
  out.plan_token = plan_token;
  return out;
}

py::object take(const Segment& segment, std::uint64_t cursor, std::uint64_t version) {
  const auto found = segment.take(cursor, version);
  if (!found) return py::none();
  return py::make_tuple(found->bucket_pos, found->digest, found->num_bytes);
}

// The array refers to the segment's memory and keeps it mapped.
py::array_t<float> exchange(const py::object& self) {
  const auto& segment = self.cast<const Segment&>();
  return py::array_t<float>(static_cast<py::ssize_t>(segment.exchange_elements()), segment.exchange(), self);
}

}  // namespace

void register_shm(py::module_& m) {
  py::register_local_exception_translator(&translate);
  using Release = py::call_guard<GilRelease>;

  py::class_<Geometry>(m, "ShmGeometry", "What the owner and the readers of a segment agree on.")
      .def(py::init(&geometry), py::kw_only(), py::arg("rank"), py::arg("num_openers"), py::arg("num_buckets"),
           py::arg("bucket_bytes"), py::arg("exchange_elements"), py::arg("plan_token"));

  py::class_<Segment>(m, "ShmSegment", "One end of a staging segment in POSIX shared memory; see csrc/shm/segment.h.")
      .def_static("create", &Segment::create, py::arg("name"), py::arg("geometry"), Release())
      .def_static("open", &Segment::open, py::arg("name"), py::arg("expected"), Release())
      .def("address", &Segment::address, py::arg("bucket_pos"))
      .def_property_readonly("size_bytes", &Segment::size_bytes)
      .def("begin", &Segment::begin, py::arg("version"))
      .def("publish", &Segment::publish, py::arg("bucket_pos"), py::arg("digest"), py::arg("num_bytes"))
      .def("take", &take, py::arg("cursor"), py::arg("version"))
      .def("current", &Segment::current)
      .def("exchange", &exchange, "The f32 exchange area; keeps the memory mapped.")
      .def("set_exchange_version", &Segment::set_exchange_version, py::arg("version"))
      .def("exchange_version", &Segment::exchange_version)
      .def("bell", &Segment::bell)
      .def("ring", &Segment::ring)
      .def("wait", &Segment::wait, py::arg("seen"), py::arg("seconds"), Release())
      .def("alive", &Segment::alive)
      .def_property_readonly("owner_closed", &Segment::owner_closed)
      .def_property_readonly("owner_pid", &Segment::owner_pid)
      .def("close", &Segment::close, Release())
      .def("detach", &Segment::close, Release());

  m.def("shm_sweep_stale", &shm::sweep_stale, py::arg("older_than_s") = 60.0, Release(),
        "Removes segments in /dev/shm whose owner died before every end had opened them; returns how many.");
}

}  // namespace wsync
