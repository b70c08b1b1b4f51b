// What a package of AOTInductor calls: sparseforge::sparse_linear and sparse_experts in a CPU's layouts, and
// decode_attention, without Python and without the dispatcher. Linked into the package's own library (see deploy/export/aoti.py).

#include "decode_attention.h"
#include "sparse_experts.h"

#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <cstdlib>

namespace {

using torch::aot_inductor::tensor_handle_to_tensor_pointer;

sparseforge::Isa isa_in_use() {
  static const sparseforge::Isa isa = [] {
    const char* wanted = std::getenv("SPARSEFORGE_CPU_ISA");
    return sparseforge::isa_named(wanted ? wanted : "");
  }();
  return isa;
}

std::optional<at::Tensor> given(AtenTensorHandle* tensor) {
  return tensor ? std::optional(*tensor_handle_to_tensor_pointer(*tensor)) : std::nullopt;
}

}  // namespace

extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_sparse_linear(
    AtenTensorHandle x, AtenTensorHandle values, AtenTensorHandle meta, const char* layout, int64_t in_features,
    AtenTensorHandle* bias, const char* activation, AtenTensorHandle* scales, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    using namespace sparseforge;
    const auto act = activation_named(activation);
    const auto kept = layout_named(layout);
    TORCH_CHECK(act && kept, "no CPU kernel for ", activation, " on ", layout);
    *result = torch::aot_inductor::new_tensor_handle(
        sparse_linear(*tensor_handle_to_tensor_pointer(x), *tensor_handle_to_tensor_pointer(values),
                      *tensor_handle_to_tensor_pointer(meta), *kept, in_features, given(bias), *act,
                      given(scales), isa_in_use()));
  });
}

extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_sparse_experts(
    AtenTensorHandle x, AtenTensorHandle values, AtenTensorHandle meta, const char* layout, int64_t in_features,
    AtenTensorHandle* offsets, AtenTensorHandle* bias, AtenTensorHandle* scales, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    using namespace sparseforge;
    const auto kept = layout_named(layout);
    TORCH_CHECK(kept, "no CPU kernel for ", layout);
    *result = torch::aot_inductor::new_tensor_handle(
        sparse_experts(*tensor_handle_to_tensor_pointer(x), *tensor_handle_to_tensor_pointer(values),
                       *tensor_handle_to_tensor_pointer(meta), *kept, in_features, given(offsets), given(bias),
                       given(scales), isa_in_use()));
  });
}

extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_decode_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle* mask, double scale,
    AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = torch::aot_inductor::new_tensor_handle(sparseforge::decode_attention(
        *tensor_handle_to_tensor_pointer(query), *tensor_handle_to_tensor_pointer(key),
        *tensor_handle_to_tensor_pointer(value), given(mask), scale, isa_in_use()));
  });
}
