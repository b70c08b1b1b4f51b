// Runs a package of sf.export(model, "m.pt2", format="aoti") without Python: token ids in, the next token out.
//
//   run_package m.pt2 12 7 301 ...
//
// Build with CMakeLists.txt beside this file, against the torch version that the package was compiled with.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) try {
  if (argc < 3) {
    std::cerr << "usage: run_package PACKAGE.pt2 TOKEN...\n";
    return 2;
  }
  std::vector<int64_t> tokens;
  for (int i = 2; i < argc; ++i) tokens.push_back(std::stoll(argv[i]));

  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const torch::Device device(loader.get_metadata()["AOTI_DEVICE_KEY"]);  // the one that it was compiled for
  const auto ids = torch::tensor(tokens, torch::kLong).unsqueeze(0).to(device);  // [1, sequence]
  const auto logits = loader.run({ids})[0];  // [1, sequence, vocabulary]
  std::cout << logits[0][-1].argmax().item<int64_t>() << "\n";
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
