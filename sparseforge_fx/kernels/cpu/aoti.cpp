// What a package of AOTInductor calls: sparseforge::sparse_linear in a CPU's layouts, without Python and without the
// dispatcher. Linked into the package's own library (see deploy/export/aoti.py).

#include "rows_linear.h"

#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <cstdlib>

extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cpu_sparse_linear(
    AtenTensorHandle x, AtenTensorHandle values, AtenTensorHandle meta, const char* layout, int64_t in_features,
    AtenTensorHandle* bias, const char* activation, AtenTensorHandle* scales, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    using namespace sparseforge;
    using torch::aot_inductor::tensor_handle_to_tensor_pointer;
    static const Isa isa = [] {
      const char* wanted = std::getenv("SPARSEFORGE_CPU_ISA");
      return isa_named(wanted ? wanted : "");
    }();
    const auto act = activation_named(activation);
    const auto kept = layout_named(layout);
    TORCH_CHECK(act && kept, "no CPU kernel for ", activation, " on ", layout);
    const auto given = [](AtenTensorHandle* t) -> std::optional<at::Tensor> {
      return t ? std::optional(*tensor_handle_to_tensor_pointer(*t)) : std::nullopt;
    };
    *result = torch::aot_inductor::new_tensor_handle(
        sparse_linear(*tensor_handle_to_tensor_pointer(x), *tensor_handle_to_tensor_pointer(values),
                      *tensor_handle_to_tensor_pointer(meta), *kept, in_features, given(bias), *act,
                      given(scales), isa));
  });
}
