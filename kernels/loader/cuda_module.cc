#include "loader/cuda_module.h"

#include <dlfcn.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

namespace pbs {
namespace {

constexpr char kModule[] = "libpbs_cuda.so";

// Files to try, in order.
std::vector<std::string> Candidates() {
  std::vector<std::string> files;
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) {
    const auto folder = program.parent_path();
    for (const auto& file :
         {folder / kModule, folder.parent_path() / "lib" / kModule}) {
      if (std::filesystem::exists(file, error)) files.push_back(file.string());
    }
  }
  files.emplace_back(kModule);
  return files;
}

}  // namespace

StatusOr<CudaModule> CudaModule::Load(const std::string& file) {
  const std::vector<std::string> files =
      file.empty() ? Candidates() : std::vector<std::string>{file};
  CudaModule module;
  // A module that is there is the one that is meant, whatever is wrong with it.
  module.file_ = files.front();
  void* handle = dlopen(module.file_.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return FailedPrecondition("cannot load the CUDA module (cuda.module): " +
                              std::string(dlerror()));
  }
  const auto find = [&](const char* name) { return dlsym(handle, name); };
  const auto id =
      reinterpret_cast<CudaInterfaceIdFunction*>(find(kCudaInterfaceIdName));
  module.count_ =
      reinterpret_cast<CudaDeviceCountFunction*>(find(kCudaDeviceCountName));
  module.create_ = reinterpret_cast<CudaCreateFunction*>(find(kCudaCreateName));
  if (id == nullptr || module.count_ == nullptr || module.create_ == nullptr) {
    return FailedPrecondition(module.file_ + " is no CUDA module of this project");
  }
  if (std::string(id()) != PBS_INTERFACE_ID) {
    return FailedPrecondition(module.file_ + " is of another build: its interface is " +
                              id() + ", this program's " + PBS_INTERFACE_ID);
  }
  return module;
}

StatusOr<int32_t> CudaModule::CountDevices() const {
  StatusOr<int32_t> count(Internal("the module did not answer"));
  count_(&count);
  return count;
}

StatusOr<std::unique_ptr<Backend>> CudaModule::Create(
    const CudaBackendOptions& options) const {
  StatusOr<std::unique_ptr<Backend>> backend(Internal("the module did not answer"));
  create_(&options, &backend);
  return backend;
}

}  // namespace pbs
