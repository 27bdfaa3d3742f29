// The CUDA rotation, compiled for the host, as a Python module without torch: tests run it under
// the sanitizers.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/rope/kernel.h"

namespace py = pybind11;
using extrope::RopeParams;
using extrope::RopeTensor;

namespace {

// Memory of exactly the size asked for, so that the address sanitizer sees the first byte past it.
class Buffer {
 public:
  explicit Buffer(const std::string& contents) : size_(contents.size()), data_(std::malloc(size_)) {
    std::memcpy(data_, contents.data(), size_);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }
  py::bytes contents() const { return py::bytes(static_cast<const char*>(data_), size_); }

 private:
  size_t size_;
  void* data_;
};

// The field may be one of a base.
template <typename Struct, typename Base, typename Field>
void def_field(py::class_<Struct>& cls, const char* name, Field Base::* field) {
  if constexpr (std::is_pointer_v<Field>) {
    cls.def_property(
        name, [field](const Struct& s) { return reinterpret_cast<uintptr_t>(s.*field); },
        [field](Struct& s, uintptr_t address) { s.*field = reinterpret_cast<Field>(address); });
  } else if constexpr (std::is_enum_v<Field>) {
    cls.def_property(
        name, [field](const Struct& s) { return static_cast<int>(s.*field); },
        [field](Struct& s, int value) { s.*field = static_cast<Field>(value); });
  } else {
    cls.def_readwrite(name, static_cast<Field Struct::*>(field));
  }
}

void def_tensor(py::module_& m) {
  py::class_<RopeTensor> tensor(m, "RopeTensor");
  def_field(tensor, "in_", &RopeTensor::in);
  def_field(tensor, "out", &RopeTensor::out);
  def_field(tensor, "in_batch", &RopeTensor::in_batch);
  def_field(tensor, "in_seq", &RopeTensor::in_seq);
  def_field(tensor, "in_head", &RopeTensor::in_head);
  def_field(tensor, "out_batch", &RopeTensor::out_batch);
  def_field(tensor, "out_seq", &RopeTensor::out_seq);
  def_field(tensor, "out_head", &RopeTensor::out_head);
  def_field(tensor, "heads", &RopeTensor::heads);
  def_field(tensor, "saved", &RopeTensor::saved);
  def_field(tensor, "saved_batch", &RopeTensor::saved_batch);
  def_field(tensor, "saved_seq", &RopeTensor::saved_seq);
  def_field(tensor, "saved_head", &RopeTensor::saved_head);
  def_field(tensor, "decay_sign", &RopeTensor::decay_sign);
}

void def_params(py::module_& m) {
  py::class_<RopeParams> params(m, "RopeParams");
  params.def(py::init([] { return RopeParams{}; }));
  params.def(
      "tensor", [](RopeParams& p, int i) { return &p.tensors[i]; },
      py::return_value_policy::reference_internal);
  def_field(params, "num_tensors", &RopeParams::num_tensors);
  def_field(params, "batch", &RopeParams::batch);
  def_field(params, "seqlen", &RopeParams::seqlen);
  def_field(params, "head_dim", &RopeParams::head_dim);
  def_field(params, "positions", &RopeParams::positions);
  def_field(params, "position_type", &RopeParams::position_type);
  def_field(params, "positions_are_offsets", &RopeParams::positions_are_offsets);
  def_field(params, "position_batch", &RopeParams::position_batch);
  def_field(params, "position_seq", &RopeParams::position_seq);
  def_field(params, "offset", &RopeParams::offset);
  def_field(params, "cu_seqlens", &RopeParams::cu_seqlens);
  def_field(params, "num_sequences", &RopeParams::num_sequences);
  def_field(params, "dtype", &RopeParams::dtype);
  def_field(params, "interleaved", &RopeParams::interleaved);
  def_field(params, "conjugate", &RopeParams::conjugate);
  def_field(params, "rotary_dim", &RopeParams::rotary_dim);
  def_field(params, "rotary_offset", &RopeParams::rotary_offset);
  def_field(params, "inv_freq", &RopeParams::inv_freq);
  def_field(params, "inv_freq_is_f64", &RopeParams::inv_freq_is_f64);
  def_field(params, "freq_batch", &RopeParams::freq_batch);
  def_field(params, "freq_head", &RopeParams::freq_head);
  def_field(params, "axes", &RopeParams::axes);
  def_field(params, "num_axes", &RopeParams::num_axes);
  def_field(params, "position_axis", &RopeParams::position_axis);
  def_field(params, "log_decay", &RopeParams::log_decay);
  def_field(params, "decay_origin", &RopeParams::decay_origin);
  def_field(params, "amplitude", &RopeParams::amplitude);
  def_field(params, "angle_grad", &RopeParams::angle_grad);
  def_field(params, "angle_heads", &RopeParams::angle_heads);
}

}  // namespace

PYBIND11_MODULE(extrope_emulation, m) {
  def_tensor(m);
  def_params(m);
  m.def("rope_launch", [](const RopeParams& p) { return extrope::rope_launch(p, nullptr, 0); });
  py::class_<Buffer>(m, "Buffer")
      .def(py::init<const std::string&>())
      .def_property_readonly("address", &Buffer::address)
      .def("contents", &Buffer::contents);
}
