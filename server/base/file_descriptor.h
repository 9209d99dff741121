// FileDescriptor: a descriptor that closes itself.
//
// Threading: a value with one owner.
#pragma once

#include <unistd.h>

#include <utility>

namespace pbs::server {

class FileDescriptor {
 public:
  FileDescriptor() = default;
  // Takes ownership of descriptor `number`; -1 is none.
  explicit FileDescriptor(int number) : number_(number) {}
  ~FileDescriptor() { Close(); }
  FileDescriptor(FileDescriptor&& other) noexcept : number_(other.Release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    if (this != &other) {
      Close();
      number_ = other.Release();
    }
    return *this;
  }

  int get() const { return number_; }
  bool is_open() const { return number_ >= 0; }
  // Gives up ownership: the caller closes the returned number.
  int Release() { return std::exchange(number_, -1); }
  void Close() {
    if (is_open()) close(Release());
  }

 private:
  int number_ = -1;
};

}  // namespace pbs::server
