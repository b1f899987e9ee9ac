#include "api/descriptor_layout.h"

#include "core/descriptors.h"

namespace py = pybind11;

namespace wsync {
namespace {

py::tuple field(const char* name, size_t offset, size_t nbytes) { return py::make_tuple(name, offset, nbytes); }

#define WSYNC_FIELD(Desc, name) fields.append(field(#name, offsetof(Desc, name), sizeof(Desc::name)))

}  // namespace

py::dict descriptor_layout() {
  py::dict layout;
  {
    py::list fields;
    WSYNC_FIELD(PackDesc, src);
    WSYNC_FIELD(PackDesc, src_stride);
    WSYNC_FIELD(PackDesc, extent);
    WSYNC_FIELD(PackDesc, dst_offset);
    WSYNC_FIELD(PackDesc, wire_word);
    WSYNC_FIELD(PackDesc, scales);
    WSYNC_FIELD(PackDesc, scale_stride);
    WSYNC_FIELD(PackDesc, amax);
    WSYNC_FIELD(PackDesc, row_phase);
    WSYNC_FIELD(PackDesc, col_phase);
    WSYNC_FIELD(PackDesc, op);
    WSYNC_FIELD(PackDesc, src_dtype);
    WSYNC_FIELD(PackDesc, elem_bytes);
    WSYNC_FIELD(PackDesc, piece_idx);
    layout["PACK_DESC"] = py::make_tuple(sizeof(PackDesc), fields);
  }
  {
    py::list fields;
    WSYNC_FIELD(AmaxDesc, src);
    WSYNC_FIELD(AmaxDesc, src_stride);
    WSYNC_FIELD(AmaxDesc, extent);
    WSYNC_FIELD(AmaxDesc, amax);
    WSYNC_FIELD(AmaxDesc, amax_stride);
    WSYNC_FIELD(AmaxDesc, scales);
    WSYNC_FIELD(AmaxDesc, scale_stride);
    WSYNC_FIELD(AmaxDesc, row_phase);
    WSYNC_FIELD(AmaxDesc, col_phase);
    WSYNC_FIELD(AmaxDesc, src_dtype);
    WSYNC_FIELD(AmaxDesc, recipe_op);
    layout["AMAX_DESC"] = py::make_tuple(sizeof(AmaxDesc), fields);
  }
  {
    py::list fields;
    WSYNC_FIELD(UnpackDesc, dst);
    WSYNC_FIELD(UnpackDesc, dst_stride);
    WSYNC_FIELD(UnpackDesc, src_stride);
    WSYNC_FIELD(UnpackDesc, extent);
    WSYNC_FIELD(UnpackDesc, src_offset);
    WSYNC_FIELD(UnpackDesc, wire_word);
    WSYNC_FIELD(UnpackDesc, elem_bytes);
    WSYNC_FIELD(UnpackDesc, piece_idx);
    WSYNC_FIELD(UnpackDesc, op);
    WSYNC_FIELD(UnpackDesc, fill);
    layout["UNPACK_DESC"] = py::make_tuple(sizeof(UnpackDesc), fields);
  }
  {
    py::list fields;
    WSYNC_FIELD(TransformDesc, codes);
    WSYNC_FIELD(TransformDesc, code_stride);
    WSYNC_FIELD(TransformDesc, extent);
    WSYNC_FIELD(TransformDesc, scales);
    WSYNC_FIELD(TransformDesc, scale_stride);
    WSYNC_FIELD(TransformDesc, tensor_scale);
    WSYNC_FIELD(TransformDesc, dst);
    WSYNC_FIELD(TransformDesc, dst_stride);
    WSYNC_FIELD(TransformDesc, dst_scales);
    WSYNC_FIELD(TransformDesc, dst_scale_stride);
    WSYNC_FIELD(TransformDesc, row_phase);
    WSYNC_FIELD(TransformDesc, col_phase);
    WSYNC_FIELD(TransformDesc, recipe_op);
    WSYNC_FIELD(TransformDesc, op);
    WSYNC_FIELD(TransformDesc, dst_dtype);
    WSYNC_FIELD(TransformDesc, piece_idx);
    layout["TRANSFORM_DESC"] = py::make_tuple(sizeof(TransformDesc), fields);
  }
  return layout;
}

}  // namespace wsync
